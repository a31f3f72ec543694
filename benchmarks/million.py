"""Millions of tokens: seconds and peak memory of a prefill in chunks, by length.

    python -m benchmarks.million --out benchmarks/results/million.json
    python -m benchmarks.million --device cuda --tokens 4194304 --chunk 65536 --passkey \
        --out benchmarks/results/million-gpu.json

The bundled checkpoints, unmodified and with each method, and a small Mamba-2 with random weights;
each length in a process of its own. `--passkey` also asks for five keys, at depths 0 to 1, in texts
of the greatest length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import widefield as wf
from benchmarks._common import environment, peak_bytes, write_rows
from benchmarks.cpu_prefill import build
from widefield import ops
from widefield.bundled import recommended_methods
from widefield.tasks.passkey import PasskeyTask, trial_rng
from widefield.tasks.texts import default_haystack

CHECKPOINTS = {"unmodified": "base", "longmamba": "base", "decimamba": "decimated"}
RANDOM = "mamba2"  # d 256, 8 layers, 8 heads, 128 states
MODELS = (*CHECKPOINTS, RANDOM)
WARM_UP = 4096
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def prepared(name: str, device: torch.device, seed: int) -> tuple[Any, Any]:
    """A model with its method on, and its tokenizer."""
    if name == RANDOM:
        model: Any = build(RANDOM, seed)
        return wf.extend(model.to(device)), None
    checkpoint = CHECKPOINTS[name]
    model, tokenizer, _ = wf.load_bundled(checkpoint, device=device)
    methods = () if name == "unmodified" else (recommended_methods(checkpoint)[name],)
    return wf.extend(model, *methods), tokenizer


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(model: Any, tokens: int, chunk: int, device: torch.device, seed: int) -> dict[str, Any]:
    """Seconds, and megabytes at the peak beyond the loaded model. The prompt stays in RAM."""
    ids = torch.randint(3, 259, (1, tokens), generator=torch.Generator().manual_seed(seed))
    for warm_up in sorted({WARM_UP, chunk if device.type == "cuda" else WARM_UP}):
        wf.prefill(model, ids[:, :warm_up], chunk_size=warm_up)
    wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before, start = peak_bytes(device), time.perf_counter()
    logits = wf.prefill(model, ids, chunk_size=chunk).logits
    wait(device)
    seconds = time.perf_counter() - start
    if not bool(logits.isfinite().all()):
        raise RuntimeError("the logits of the last token are not finite")
    return {
        "tokens": tokens,
        "chunk": chunk,
        "seconds": round(seconds, 2),
        "microseconds_per_token": round(seconds / tokens * 1e6, 2),
        "peak_megabytes": round((peak_bytes(device) - before) / 1e6, 1),
    }


def passkey(model: Any, tokenizer: Any, tokens: int, chunk: int, seed: int) -> dict[str, Any]:
    """Keys found of five, one a depth, by greedy decoding behind a prefill in chunks."""
    task = PasskeyTask(tokenizer, default_haystack())
    samples = [task.sample(tokens, d, trial_rng(seed, tokens, d, 0)) for d in DEPTHS]
    ids = torch.stack([torch.from_numpy(sample.ids) for sample in samples]).to(model.device)
    start = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=task.answer_tokens,
        do_sample=False,
        pad_token_id=0,
        prefill_chunk_size=chunk,
    )
    answers = made[:, tokens:].tolist()
    found = [task.judge(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    return {
        "tokens": tokens,
        "chunk": chunk,
        "seconds_of_all": round(time.perf_counter() - start, 2),
        "depths": list(DEPTHS),
        "found": found,
    }


def one(args: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    device = torch.device(args.device)
    name, task, tokens = args.one[0], args.one[1], int(args.one[2])
    row = {"method": name, "task": task, "backend": args.backend}
    with ops.use_backend(args.backend) if args.backend else nullcontext():
        model, tokenizer = prepared(name, device, args.seed)
        if task == "passkey":
            return row | passkey(model, tokenizer, tokens, args.chunk, args.seed)
        return row | measure(model, tokens, args.chunk, device, args.seed)


def in_its_own_process(args: argparse.Namespace, name: str, task: str, tokens: int) -> Any:
    """The same, or why there is no such row."""
    options = ["--chunk", str(args.chunk), "--seed", str(args.seed), "--device", args.device]
    options += ["--backend", args.backend] if args.backend else []
    program = [sys.executable, "-m", "benchmarks.million", *options]
    command = [*program, "--one", name, task, str(tokens)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return {"method": name, "task": task, "tokens": tokens, "failed": reason}


def jobs(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    found = [(name, "prefill", tokens) for tokens in args.tokens for name in args.models]
    if args.passkey:
        asked = [name for name in args.models if name in CHECKPOINTS]
        found += [(name, "passkey", max(args.tokens)) for name in asked]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/million.json"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(CHECKPOINTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="as `ops.use_backend`; by default the device's own")
    parser.add_argument("--chunk", type=int, default=16_384)
    parser.add_argument("--passkey", action="store_true", help="ask for keys, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return
    head = environment("benchmarks.million", torch.device(args.device), args.seed)
    found: dict[str, Any] = head | {"model": "bundled checkpoints, float32", "rows": []}
    for name, task, tokens in jobs(args):
        found["rows"].append(in_its_own_process(args, name, task, tokens))
        print(found["rows"][-1], flush=True)
        write_rows(args.out, found)


if __name__ == "__main__":
    main()
