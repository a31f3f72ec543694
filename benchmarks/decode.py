"""Milliseconds a decoded token: stock transformers, and ours without and with a CUDA graph.

    python -m benchmarks.decode --out benchmarks/results/decode.json

Models of 130 million random weights, bfloat16, on one GPU. A time is that of generate() with many
new tokens less that with few, by the number of tokens between; sides take turns. mamba-ssm's step
kernel is what stock transformers takes where it is installed; --without-mamba-ssm hides it.
Nothing is timed unless it was right in this run: the logits of our decode steps may be at most
twice as far from those in float32 as stock's are, and a graph must give the very same tokens.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FEW, MANY, REPEATS = 8, 40, 5
Run = Callable[[int], Tensor]


def build(kind: str) -> Any:
    """A model of Mamba's or Mamba-2's 130M shape with random weights, float32."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    common: dict[str, Any] = {
        "hidden_size": 768, "num_hidden_layers": 24, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        if kind == "mamba":
            return MambaForCausalLM(MambaConfig(vocab_size=50280, state_size=16, **common)).eval()
        sizes: dict[str, Any] = {"state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1}
        config = Mamba2Config(vocab_size=50288, **sizes, **common)
        return Mamba2ForCausalLM(config).eval()


@torch.no_grad()
def step_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, n, V) of the last 16 tokens, each in a decode step of its own."""
    out = model(input_ids=ids[:, :-16], use_cache=True, logits_to_keep=1)
    found = []
    for t in range(ids.shape[1] - 16, ids.shape[1]):
        given = {"cache_params": out.cache_params, "use_cache": True}
        out = model(input_ids=ids[:, t : t + 1], **given)
        found.append(out.logits.float())
    return torch.cat(found, dim=1)


def generate(model: Any, ids: Tensor, **options: Any) -> Run:
    def run(tokens: int) -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip

    return run


def seconds(run: Run, tokens: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(tokens)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def milliseconds(runs: dict[str, Run]) -> dict[str, list[float]]:
    """p20, p50 and p80 of the milliseconds a token of each side; the sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        seconds(run, FEW)
    for _ in range(REPEATS):
        for name, run in runs.items():
            few = seconds(run, FEW)
            times[name].append((seconds(run, MANY) - few) / (MANY - FEW) * 1e3)
    ordered = {name: sorted(values) for name, values in times.items()}
    return {
        name: [values[int(share * (REPEATS - 1) + 0.5)] for share in (0.2, 0.5, 0.8)]
        for name, values in ordered.items()
    }


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def checked(exact: Any, stock: Any, ours: Any, ids: Tensor) -> dict[str, float]:
    """How far our decode steps are off, and how far they may be.

    Args:
        exact: the stock model in float32.
        stock: the same in bfloat16.
        ours: that one extended.
        ids: (B, L) some text.

    Raises:
        SystemExit: if ours is too far off, or a graph gives other tokens.
    """
    kind, truth = type(ours).__name__, step_logits(exact, ids)
    off, allowed = error(step_logits(ours, ids), truth), 2 * error(step_logits(stock, ids), truth)
    if not off <= allowed:
        raise SystemExit(f"{kind}: logits are off by {off:.2e}, allowed {allowed:.2e}")
    plain, graphed = (generate(ours, ids, cuda_graph=g)(FEW + 8) for g in (False, True))
    if not torch.equal(plain, graphed):
        raise SystemExit(f"{kind}, batch {ids.shape[0]}: the graph gives other tokens")
    return {"error": off, "allowed": allowed}


def rows(kinds: list[str], batches: list[int], stock_name: str) -> list[dict[str, Any]]:
    from widefield.extension import extend

    found = []
    for kind in kinds:
        exact = build(kind)
        stock = copy.deepcopy(exact).bfloat16()
        ours = extend(copy.deepcopy(stock))
        for batch in batches:
            generator = torch.Generator("cuda").manual_seed(batch)
            ids = torch.randint(3, 50000, (batch, 64), device="cuda", generator=generator)
            off = checked(exact, stock, ours, ids)
            runs = {
                stock_name: generate(stock, ids),
                "widefield": generate(ours, ids),
                "widefield, CUDA graph": generate(ours, ids, cuda_graph=True),
            }
            for name, (p20, p50, p80) in milliseconds(runs).items():
                rate = round(batch / p50 * 1e3, 1)
                row = {
                    "model": kind, "batch": batch, "side": name, "p20_ms": round(p20, 4),
                    "p50_ms": round(p50, 4), "p80_ms": round(p80, 4), "tokens_a_second": rate,
                    **off,
                }  # fmt: skip
                print(f"{kind:>7} batch {batch:>3} {name:<36} {p50:8.3f} ms a token", flush=True)
                found.append(row)
    return found


def has_peer() -> bool:
    """Whether transformers will find mamba-ssm's step kernel."""
    try:
        importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    except ImportError:
        return False
    return True


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--models", nargs="+", default=["mamba", "mamba2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--without-mamba-ssm", action="store_true")
    args = parser.parse_args()
    if args.without_mamba_ssm:
        sys.modules["mamba_ssm"] = None  # type: ignore[assignment]
    stock = "transformers with mamba-ssm's step" if has_peer() else "transformers"
    packages = ("widefield", "torch", "transformers", "triton", "mamba-ssm")
    result = {
        "command": "python -m benchmarks.decode " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in packages},
        "dtype": "bfloat16",
        "rows": rows(args.models, args.batches, stock),
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
