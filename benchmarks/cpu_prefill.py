"""Prefill on the CPU: stock transformers against the same model after `wf.extend(model)`.

    python -m benchmarks.cpu_prefill --out benchmarks/results/cpu_prefill.json
    python -m benchmarks.cpu_prefill --model mamba2 --out benchmarks/results/cpu_prefill_mamba2.json

Times: both in one process, in turn, after one warm-up each, which compiles our kernels or loads
them. Peak memory: each in a process of its own, resident memory at the peak less that of the built
model. The share of the processor that other programs took meanwhile is noted beside each time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import widefield as wf
from benchmarks._common import peak_kibibytes, processor

_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "expand": 2,
    "vocab_size": 384,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mamba": _COMMON | {"state_size": 16},
    "mamba2": _COMMON | {"state_size": 128, "num_heads": 8, "head_dim": 64, "n_groups": 1},
}
KINDS = ("stock", "widefield")


def build(name: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    if name == "mamba2":
        return Mamba2ForCausalLM(Mamba2Config(**SHAPES[name])).eval()
    return MambaForCausalLM(MambaConfig(**SHAPES[name])).eval()


def prefill(model: PreTrainedModel, tokens: int, seed: int) -> torch.Tensor:
    """Logits of the last token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (1, tokens), generator=generator)
    with torch.inference_mode():
        return model(ids, logits_to_keep=1, use_cache=True).logits[0, -1]


def busy_seconds() -> float | None:
    """Processor seconds that all programs have used; None where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(f) for f in file.readline().split()[1:]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def timed(model: PreTrainedModel, kind: str, tokens: int, seed: int) -> dict[str, float | None]:
    """Seconds of one prefill, and the share of all cores that other programs used during it."""
    with wf.extended(model) if kind == "widefield" else nullcontext():
        before, own, start = busy_seconds(), time.process_time(), time.perf_counter()
        prefill(model, tokens, seed)
        seconds = time.perf_counter() - start
        after, own = busy_seconds(), time.process_time() - own
    others = None
    if before is not None and after is not None:
        others = max(0.0, after - before - own) / (seconds * (os.cpu_count() or 1))
    return {"seconds": seconds, "others_share": others}


def compare(
    name: str, tokens: int, kinds: tuple[str, ...], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """One row a kind: times taken in turn, and peak memory."""
    model = build(name, seed)
    runs: dict[str, list[dict[str, float | None]]] = {kind: [] for kind in kinds}
    for kind in kinds:
        timed(model, kind, min(tokens, 256), seed)
    for _ in range(repeats):
        for kind in kinds:
            runs[kind].append(timed(model, kind, tokens, seed))
    rows = []
    for kind in kinds:
        seconds = [run["seconds"] for run in runs[kind] if run["seconds"] is not None]
        row = {
            "kind": kind,
            "tokens": tokens,
            "median_seconds": round(statistics.median(seconds), 4),
            "microseconds_per_token": round(statistics.median(seconds) / tokens * 1e6, 2),
            "peak_megabytes": peak_of(name, kind, tokens, seed),
            "runs": [
                {k: None if v is None else round(v, 4) for k, v in r.items()} for r in runs[kind]
            ],
        }
        rows.append(row)
        print(
            f"{kind:>10} {tokens:>7} tokens  {row['median_seconds']:8.3f} s  "
            f"{row['microseconds_per_token']:8.1f} µs/token  {row['peak_megabytes']:7.1f} MB",
            flush=True,
        )
    return rows


def peak_of(name: str, kind: str, tokens: int, seed: int) -> float:
    """Megabytes that a prefill adds to the memory of the built model, in a fresh process."""
    program = [sys.executable, "-m", "benchmarks.cpu_prefill"]
    command = [*program, "--model", name, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--peak", kind, "--tokens", str(tokens)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def print_peak(name: str, kind: str, tokens: int, seed: int) -> None:
    model = build(name, seed)
    with wf.extended(model) if kind == "widefield" else nullcontext():
        prefill(model, 16, seed)
        before = peak_kibibytes()
        prefill(model, tokens, seed)
        print(round((peak_kibibytes() - before) * 1024 / 1e6, 1))


def largest_difference(name: str, tokens: int, seed: int) -> float:
    """Largest error of our logits, relative to the largest stock logit."""
    model = build(name, seed)
    stock = prefill(model, tokens, seed)
    with wf.extended(model):
        ours = prefill(model, tokens, seed)
    return ((ours - stock).abs().max() / stock.abs().max()).item()


def header(name: str, seed: int) -> dict[str, Any]:
    packages = ("widefield", "torch", "transformers", "numba", "numpy")
    return {
        "command": "python -m benchmarks.cpu_prefill " + " ".join(sys.argv[1:]),
        "device": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "seed": seed,
        "model": SHAPES[name] | {"class": name, "dtype": "float32", "logits_to_keep": 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(SHAPES), default="mamba")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--stock-up-to", type=int, default=8192, help="longer is ours alone")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        print_peak(args.model, args.peak, args.tokens, args.seed)
        return
    result: dict[str, Any] = header(args.model, args.seed) | {"rows": [], "ratios": []}
    result["largest_relative_difference_at_2048"] = largest_difference(args.model, 2048, args.seed)
    for tokens in args.lengths:
        kinds = KINDS if tokens <= args.stock_up_to else KINDS[1:]
        rows = compare(args.model, tokens, kinds, args.repeats, args.seed)
        result["rows"] += rows
        if len(rows) == 2:
            stock, ours = rows
            speed = stock["median_seconds"] / ours["median_seconds"]
            memory = ours["peak_megabytes"] / stock["peak_megabytes"]
            result["ratios"].append(
                {"tokens": tokens, "times_faster": round(speed, 2), "memory": round(memory, 3)}
            )
            print(
                f"{'':>10} {tokens:>7} tokens  {speed:.1f} times faster, {memory:.2f} of the memory"
            )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
