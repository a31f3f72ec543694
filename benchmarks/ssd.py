"""The scan of Mamba-2 on one GPU: forward and training step, beside mamba-ssm where it is there.

    python -m benchmarks.ssd --out benchmarks/results/ssd.json

Nothing is timed unless it was right in this run: y and the final state are first compared with
float64, and may be at most twice as far off as the reference in the inputs' own dtype. mamba-ssm's
errors are noted beside ours. Times are of the GPU's events around one call each, in turn, so that
what the host needs to start the kernels counts where it is longer than they are.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from widefield.ops.ssd import chunked, cuda
from widefield.plan import SSDInputs

Scan = Callable[[SSDInputs], tuple[Tensor, Tensor]]
# Heads, channels of a head, groups, states: Mamba-2 130m and 2.7B, Nemotron-H 8B.
SHAPES = {"130m": (24, 64, 1, 128), "2.7B": (80, 64, 1, 128), "nemotron": (128, 64, 8, 128)}
TOKENS = (2048, 8192, 65_536, 524_288)
CHECKED = 1000  # tokens
MOST = 12 << 30  # bytes of x; what is longer is left out
LEAVES = ("x", "delta", "A", "B", "C", "D", "delta_bias")


def inputs_of(tokens: int, shape: str, dtype: torch.dtype, seed: int) -> SSDInputs:
    """A batch of one, with the views that a model's convolution gives."""
    heads, width, groups, states = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

    sizes = [heads * width, groups * states, groups * states]
    x, B, C = normal(1, tokens, sum(sizes)).split(sizes, dim=-1)
    return SSDInputs(
        x=x.unflatten(-1, (heads, width)),
        delta=normal(1, tokens, heads) - 3,
        A=-torch.linspace(1, 16, heads, device="cuda"),
        B=B.unflatten(-1, (groups, states)),
        C=C.unflatten(-1, (groups, states)),
        D=torch.ones(heads, device="cuda"),
        delta_bias=torch.zeros(heads, device="cuda"),
    )


def mamba_ssm_scan(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import (  # type: ignore[import-not-found]
        mamba_chunk_scan_combined,
    )

    return mamba_chunk_scan_combined(
        inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, 256,
        D=inputs.D, dt_bias=inputs.delta_bias, dt_softplus=True, return_final_states=True,
    )  # fmt: skip


def kernels() -> dict[str, Scan]:
    found: dict[str, Scan] = {"widefield": cuda.ssd}
    if importlib.util.find_spec("mamba_ssm") is not None:
        found["mamba-ssm"] = mamba_ssm_scan
    return found


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def errors(scan: Scan, shape: str, dtype: torch.dtype, seed: int, name: str) -> dict[str, float]:
    """How far the kernel is off, and how far it may be.

    Raises:
        SystemExit: if ours is further off.
    """
    inputs = inputs_of(CHECKED, shape, dtype, seed)
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias")
    truth = chunked.ssd(inputs.replace(**{n: getattr(inputs, n).double() for n in names}))
    same = chunked.ssd(inputs)
    found = {}
    for part, value, near, exact in zip(("y", "state"), scan(inputs), same, truth, strict=True):
        off, allowed = error(value, exact), 2 * error(near, exact) + 3e-7
        found |= {f"error_of_{part}": off, f"allowed_of_{part}": allowed}
        if name == "widefield" and not off <= allowed:
            raise SystemExit(f"{part} is off by {off:.2e}, allowed {allowed:.2e}: nothing is timed")
    return found


def milliseconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The 20th, 50th and 80th percentile of each, run in turn."""
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            pairs[name].append((before, after))
            torch.cuda.synchronize()
    found = {}
    for name, events in pairs.items():
        times = sorted(before.elapsed_time(after) for before, after in events)
        found[name] = [times[int(share * (len(times) - 1) + 0.5)] for share in (0.2, 0.5, 0.8)]
    return found


def forward(scan: Scan, inputs: SSDInputs) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            scan(inputs)

    return run


def training(scan: Scan, inputs: SSDInputs) -> Callable[[], object]:
    leaves = {n: getattr(inputs, n).detach().clone().requires_grad_() for n in LEAVES}

    def run() -> None:
        y, _ = scan(inputs.replace(**leaves))
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    return run


def rows(seed: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    found = []
    for shape, (heads, width, _, _) in SHAPES.items():
        scans, off, first = kernels(), {}, {}
        for name, scan in scans.items():
            start = time.perf_counter()
            scan(inputs_of(64, shape, dtype, seed))
            torch.cuda.synchronize()
            first[name] = round(time.perf_counter() - start, 2)
            off[name] = errors(scan, shape, dtype, seed, name)
        for work, make, most in (("forward", forward, 1 << 20), ("training", training, 65_536)):
            for tokens in TOKENS:
                if tokens > most or tokens * heads * width * dtype.itemsize > MOST:
                    continue
                inputs = inputs_of(tokens, shape, dtype, seed)
                runs = {name: make(scan, inputs) for name, scan in scans.items()}
                for name, times in milliseconds(runs, 5 if tokens > 100_000 else 15).items():
                    p20, p50, p80 = (round(t, 4) for t in times)
                    row = {
                        "kernel": name, "work": work, "shape": shape, "tokens": tokens,
                        "dtype": str(dtype).split(".")[1], "p20_ms": p20, "p50_ms": p50,
                        "p80_ms": p80, "first_call_s": first[name], **off[name],
                    }  # fmt: skip
                    found.append(row)
                    print(f"{shape:>9} {work:>8} {tokens:>8} {name:>10} {p50:9.3f} ms", flush=True)
    return found


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Scan of Mamba-2, timed on one GPU.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ssd.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    content = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {n: installed(n) for n in ("torch", "triton", "mamba-ssm")},
        "seed": args.seed,
        "rows": rows(args.seed, getattr(torch, args.dtype)),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
