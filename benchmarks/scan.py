"""The selective scan's forward on one GPU: CUDA C++, Triton, and mamba-ssm where it is there.

    python -m benchmarks.scan --out benchmarks/results/scan.json

Nothing is timed unless it was right in this run: y and the final state of each kernel are first
compared with the reference in float64, and may be at most twice as far off as the reference in the
inputs' own dtype. Times are of the GPU, between events, one call each; the inputs of the short
lengths are changed from call to call, so that they do not come out of the cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import installed, quantiles
from widefield.ops import _nvrtc
from widefield.ops._delta import effective_delta
from widefield.ops.selective_scan import cuda, native, reference
from widefield.plan import LayerPlan, ScanInputs

Scan = Callable[[ScanInputs], tuple[Tensor, Tensor]]
STATES = 16
CHECKED = 1000  # tokens
CACHE = 64 << 20  # bytes, more than the level-2 cache holds


def inputs_of(tokens: int, channels: int, dtype: torch.dtype, seed: int) -> ScanInputs:
    """A batch of one, with the views that a model's projections give."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    x, z = normal(1, tokens, 2 * channels).chunk(2, -1)
    rank = channels // 32
    projected = normal(1, tokens, rank + 2 * STATES)
    rates = torch.arange(1, STATES + 1, device="cuda", dtype=torch.float32)
    return ScanInputs(
        x=x,
        delta=normal(1, tokens, channels) - 3,
        A=-rates.expand(channels, STATES).contiguous(),
        B=projected[..., rank : rank + STATES],
        C=projected[..., rank + STATES :],
        D=torch.ones(channels, device="cuda"),
        z=z,
        delta_bias=torch.zeros(channels, device="cuda"),
    )


def floor_of(inputs: ScanInputs) -> LayerPlan:
    """As LongMamba's: about half of the tokens leave a channel as it was."""
    return LayerPlan(delta_floor=torch.full_like(inputs.A[:, 0], 0.05))


def native_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    return native.selective_scan(inputs, LayerPlan())


def native_scan_with_floor(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    return native.selective_scan(inputs, floor_of(inputs))


def triton_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    return cuda.triton_scan(inputs, None)


def mamba_ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]
        selective_scan_fn,
    )

    def turned(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.transpose(1, 2)

    y, state = selective_scan_fn(
        turned(inputs.x), turned(inputs.delta), inputs.A, turned(inputs.B), turned(inputs.C),
        inputs.D, z=turned(inputs.z), delta_bias=inputs.delta_bias, delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    return y.transpose(1, 2), state


def kernels() -> dict[str, Scan]:
    found: dict[str, Scan] = {
        "cuda c++": native_scan,
        "with a floor": native_scan_with_floor,
        "triton": triton_scan,
    }
    if importlib.util.find_spec("mamba_ssm") is not None:
        found["mamba-ssm"] = mamba_ssm_scan
    return found


def double(inputs: ScanInputs, plan: LayerPlan) -> ScanInputs:
    """In float64, with Δ frozen where float32 freezes it."""
    fields = {name: getattr(inputs, name) for name in ("x", "delta", "A", "B", "C", "D", "z")}
    fields["delta_bias"] = inputs.delta_bias
    exact = inputs.replace(**{name: value.double() for name, value in fields.items()})
    delta = effective_delta(exact, None).masked_fill(effective_delta(inputs, plan) == 0, 0.0)
    return exact.replace(delta=delta, delta_bias=None, delta_softplus=False)


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def errors(scan: Scan, channels: int, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """How far the kernel is off, and how far it may be.

    Raises:
        SystemExit: if it is further off.
    """
    inputs = inputs_of(CHECKED, channels, dtype, seed)
    plan = floor_of(inputs) if scan is native_scan_with_floor else LayerPlan()
    truth = reference.selective_scan(double(inputs, plan))
    same = reference.selective_scan(inputs, plan)
    found = {}
    for name, value, near, exact in zip(("y", "state"), scan(inputs), same, truth, strict=True):
        off, allowed = error(value, exact), 2 * error(near, exact) + 3e-7
        found |= {f"error_of_{name}": off, f"allowed_of_{name}": allowed}
        if not off <= allowed:
            raise SystemExit(f"{name} is off by {off:.2e}, allowed {allowed:.2e}: nothing is timed")
    return found


def milliseconds(scan: Scan, tokens: int, channels: int, dtype: torch.dtype) -> list[float]:
    size = 3 * tokens * channels * torch.finfo(dtype).bits // 8
    sets = [inputs_of(tokens, channels, dtype, seed) for seed in range(max(1, CACHE // size + 1))]
    for inputs in sets:
        scan(inputs)
    pairs = []
    repeats = 5 if tokens > 100_000 else 15
    for index in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        scan(sets[index % len(sets)])
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return list(quantiles([before.elapsed_time(after) for before, after in pairs[1:]]))


def rows(seed: int) -> list[dict[str, Any]]:
    found = []
    for channels, dtype in ((1536, torch.bfloat16), (512, torch.float32)):
        for name, scan in kernels().items():
            off = errors(scan, channels, dtype, seed)
            for tokens in (2048, 8192, 65_536, 524_288):
                if name == "triton" and tokens > 8192:
                    continue
                p20, p50, p80 = milliseconds(scan, tokens, channels, dtype)
                row = {
                    "kernel": name, "channels": channels, "dtype": str(dtype).split(".")[1],
                    "tokens": tokens, "p20_ms": round(p20, 4), "p50_ms": round(p50, 4),
                    "p80_ms": round(p80, 4), "ns_a_token": round(p50 * 1e6 / tokens, 2), **off,
                }  # fmt: skip
                line = (
                    f"{name:>12} D {channels:>5} {row['dtype']:>9} {tokens:>7} tokens {p50:9.4f} ms"
                )
                print(line, flush=True)
                found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not _nvrtc.available():
        raise SystemExit("the scan in CUDA C++ needs a GPU, cuda-bindings and NVRTC")
    packages = ("widefield", "torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "mamba-ssm")
    result = {
        "command": "python -m benchmarks.scan " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in packages},
        "states": STATES,
        "batch": 1,
        "rows": rows(args.seed),
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
