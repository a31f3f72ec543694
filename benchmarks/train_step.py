"""The selective scan's forward and backward on one GPU: CUDA C++, Triton, and mamba-ssm if there.

    python -m benchmarks.train_step --out benchmarks/results/train_step.json

Nothing is timed unless it was right in this run: outputs and gradients of each kernel are first
compared with the reference in float64, and may be at most twice as far off as the reference in the
inputs' own dtype. Times are of the GPU, between events, one call each, the kernels by turns.
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

from benchmarks.scan import installed
from widefield.ops import _nvrtc
from widefield.ops.selective_scan import cuda, reference, wide
from widefield.plan import LayerPlan, ScanInputs

Scan = Callable[[ScanInputs], Tensor]
STATES = 16
CHECKED = (2, 256, 256)  # rows, tokens, channels
SHAPES = (
    (64, 2048, 1536, torch.bfloat16),
    (128, 1024, 512, torch.bfloat16),
    (128, 1024, 512, torch.float32),
)
LEAVES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")


def inputs_of(batch: int, tokens: int, channels: int, dtype: torch.dtype, seed: int) -> ScanInputs:
    """With the views that a model's projections give."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    _, z = normal(batch, tokens, 2 * channels).chunk(2, -1)
    rank = channels // 32
    projected = normal(batch, tokens, rank + 2 * STATES)
    rates = torch.arange(1, STATES + 1, device="cuda", dtype=torch.float32)
    return ScanInputs(
        x=normal(batch, tokens, channels),
        delta=normal(batch, tokens, channels) - 3,
        A=-rates.expand(channels, STATES).contiguous(),
        B=projected[..., rank : rank + STATES],
        C=projected[..., rank + STATES :],
        D=torch.ones(channels, device="cuda"),
        z=z,
        delta_bias=torch.zeros(channels, device="cuda"),
    )


def native_scan(inputs: ScanInputs) -> Tensor:
    return wide.selective_scan(inputs, LayerPlan())[0]


def triton_scan(inputs: ScanInputs) -> Tensor:
    return cuda.triton_scan(inputs, None)[0]


def mamba_ssm_scan(inputs: ScanInputs) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]
        selective_scan_fn,
    )

    def turned(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.transpose(1, 2)

    y = selective_scan_fn(
        turned(inputs.x), turned(inputs.delta), inputs.A, turned(inputs.B), turned(inputs.C),
        inputs.D, z=turned(inputs.z), delta_bias=inputs.delta_bias, delta_softplus=True,
    )  # fmt: skip
    return y.transpose(1, 2)


def kernels(channels: int) -> dict[str, Scan]:
    found: dict[str, Scan] = {"cuda c++": native_scan}
    if channels <= 512:
        found["triton"] = triton_scan
    if importlib.util.find_spec("mamba_ssm") is not None:
        found["mamba-ssm"] = mamba_ssm_scan
    return found


def for_mamba_ssm(inputs: ScanInputs) -> ScanInputs:
    """The same numbers with tokens side by side, as mamba-ssm has them in a model."""

    def turned(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    large = {name: turned(getattr(inputs, name)) for name in ("x", "delta", "B", "C", "z")}
    return inputs.replace(**large)


def with_leaves(inputs: ScanInputs) -> tuple[ScanInputs, dict[str, Tensor]]:
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in LEAVES}
    return inputs.replace(**leaves), leaves


def results(scan: Scan, inputs: ScanInputs, gradient: Tensor) -> dict[str, Tensor]:
    inputs, leaves = with_leaves(inputs)
    y = scan(inputs)
    y.backward(gradient.to(y.dtype))
    found = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), **found}  # type: ignore[dict-item]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def check(name: str, scan: Scan, dtype: torch.dtype, seed: int) -> float:
    """The largest error, as a share of what is allowed.

    Raises:
        SystemExit: if it is more than that, for a kernel of ours.
    """
    inputs = inputs_of(*CHECKED, dtype, seed)
    gradient = torch.randn(inputs.x.shape, device="cuda", dtype=dtype)
    wide_fields = {n: getattr(inputs, n).double() for n in LEAVES}
    truth = results(_reference, inputs.replace(**wide_fields), gradient)
    same, ours = (results(one, inputs, gradient) for one in (_reference, scan))
    shares = {n: error(ours[n], t) / (2 * error(same[n], t) + 3e-7) for n, t in truth.items()}
    worst = max(shares, key=lambda n: shares[n])
    if not shares[worst] <= 1 and name != "mamba-ssm":
        raise SystemExit(f"{name}: {worst} has {shares[worst]:.2f} of the allowed error")
    return shares[worst]


def _reference(inputs: ScanInputs) -> Tensor:
    return reference.selective_scan(inputs)[0]


def milliseconds(call: Callable[[], object]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def steps(scan: Scan, inputs: ScanInputs, gradient: Tensor) -> dict[str, Callable[[], object]]:
    leaves, tensors = with_leaves(inputs)

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(inputs)

    def both() -> None:
        for leaf in tensors.values():
            leaf.grad = None
        scan(leaves).backward(gradient)

    return {"forward": forward, "forward and backward": both}


def rows(seed: int, repeats: int) -> list[dict[str, Any]]:
    found = []
    for batch, tokens, channels, dtype in SHAPES:
        inputs = inputs_of(batch, tokens, channels, dtype, seed)
        gradient = torch.randn_like(inputs.x)
        shares, calls = {}, {}
        for name, scan in kernels(channels).items():
            shares[name] = check(name, scan, dtype, seed)
            given = for_mamba_ssm(inputs) if name == "mamba-ssm" else inputs
            calls |= {(name, step): call for step, call in steps(scan, given, gradient).items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(repeats + 1):
            for key, call in calls.items():
                times[key].append(milliseconds(call))
        for (name, step), all_times in times.items():
            kept = sorted(all_times[1:])
            p20, p50, p80 = (kept[int(share * (len(kept) - 1) + 0.5)] for share in (0.2, 0.5, 0.8))
            row = {
                "kernel": name, "step": step, "batch": batch, "tokens": tokens,
                "channels": channels, "dtype": str(dtype).split(".")[1], "p20_ms": round(p20, 4),
                "p50_ms": round(p50, 4), "p80_ms": round(p80, 4),
                "share_of_allowed_error": round(shares[name], 3),
            }  # fmt: skip
            shape = f"{batch} x {tokens}, D {channels}, {row['dtype']}"
            print(f"{name:>10} {shape:28} {step:>20} {p50:9.3f} ms", flush=True)
            found.append(row)
        del inputs, gradient, calls
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    if not _nvrtc.available():
        raise SystemExit("the scan in CUDA C++ needs a GPU, cuda-bindings and NVRTC")
    packages = ("widefield", "torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "mamba-ssm")
    result = {
        "command": "python -m benchmarks.train_step " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in packages},
        "states": STATES,
        "rows": rows(args.seed, args.repeats),
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
