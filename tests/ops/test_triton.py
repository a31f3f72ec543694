"""The Triton kernels against float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from widefield.ops.causal_conv1d import reference as conv_reference
from widefield.ops.selective_scan import reference
from widefield.plan import LayerPlan, ScanInputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.triton
DEVICE = "cpu" if INTERPRETED else "cuda"
LENGTHS = [1, 63] if INTERPRETED else [1, 63, 1000]
OPTIONS = ["D", "z", "bias", "state", "valid", "floor", "scale", "decay"]


def _case(
    batch: int, length: int, channels: int, states: int, options: list[str]
) -> tuple[dict[str, Tensor], Tensor | None, LayerPlan]:
    torch.manual_seed(length)
    x, z = torch.randn(batch, length, 2 * channels).chunk(2, -1)
    tensors = {
        "x": x,
        "delta": torch.randn(batch, length, channels) * 2 - 2,
        "A": -torch.rand(channels, states) * 3,
        "B": torch.randn(batch, length, states),
        "C": torch.randn(batch, length, states),
    }
    if "D" in options:
        tensors["D"] = torch.randn(channels)
    if "z" in options:
        tensors["z"] = z
    if "bias" in options:
        tensors["delta_bias"] = torch.randn(channels)
    if "state" in options:
        tensors["initial_state"] = torch.randn(batch, channels, states)
    valid = None
    if "valid" in options:
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[0, : length // 3] = False
    plan = LayerPlan(
        delta_floor=torch.rand(channels) * 0.2 if "floor" in options else None,
        delta_scale=torch.rand(batch, channels) + 0.5 if "scale" in options else None,
        decay_scale=torch.rand(channels) + 0.5 if "decay" in options else None,
    )
    return tensors, valid, plan


def _run(scan, tensors, valid, plan, dtype, device) -> dict[str, Tensor]:
    leaves = {k: t.detach().to(device, dtype).requires_grad_() for k, t in tensors.items()}
    inputs = ScanInputs(**leaves, valid=None if valid is None else valid.to(device))  # type: ignore[arg-type]
    y, state = scan(inputs, plan.to(device))
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator).to(device) for t in (y, state)]
    ((y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()).backward()
    out = {"y": y, "state": state, **{f"d{k}": t.grad for k, t in leaves.items()}}
    return {k: t.detach().double().cpu() for k, t in out.items() if t is not None}


def _error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("options", [[], ["D", "z", "bias"], OPTIONS], ids=["bare", "usual", "all"])
def test_scan_and_gradients_are_as_exact_as_the_reference(length: int, options: list[str]) -> None:
    from widefield.ops.selective_scan import cuda

    tensors, valid, plan = _case(2, length, 40, 16, options)
    truth = _run(reference.selective_scan, tensors, valid, plan, torch.float64, "cpu")
    same = _run(reference.selective_scan, tensors, valid, plan, torch.float32, "cpu")
    ours = _run(cuda.triton_scan, tensors, valid, plan, torch.float32, DEVICE)
    for name, value in truth.items():
        allowed = 2 * _error(same[name], value) + 3e-7
        assert _error(ours[name], value) <= allowed, name


@pytest.mark.parametrize("ends", [[0, 0, 17, 18, 41, 41]], ids=str)
def test_sequences_side_by_side_and_their_gradients_are_as_exact_as_the_reference(
    ends: list[int],
) -> None:
    from widefield.ops.selective_scan import cuda

    tensors, _, plan = _case(1, ends[-1], 40, 16, ["D", "z", "bias", "floor"])
    rows = len(ends) - 1
    tensors["initial_state"] = torch.randn(rows, 40, 16)
    plan = dataclasses.replace(plan, delta_scale=torch.rand(rows, 40) + 0.5)

    def run(scan, dtype, device):
        cut = torch.tensor(ends, dtype=torch.int32, device=device)
        packed = lambda inputs, plan: scan(inputs.replace(cu_seqlens=cut), plan)  # noqa: E731
        return _run(packed, tensors, None, plan, dtype, device)

    truth = run(reference.selective_scan, torch.float64, "cpu")
    same = run(reference.selective_scan, torch.float32, "cpu")
    ours = run(cuda.triton_scan, torch.float32, DEVICE)
    for name, value in truth.items():
        assert _error(ours[name], value) <= 2 * _error(same[name], value) + 3e-7, name


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scan_is_as_exact_as_the_reference(dtype: torch.dtype) -> None:
    from widefield.ops.selective_scan import cuda

    tensors, valid, plan = _case(2, 500, 64, 16, OPTIONS)
    rounded = {k: t.to(dtype) for k, t in tensors.items() if k not in ("A", "initial_state")}
    tensors = {**tensors, **{k: t.float() for k, t in rounded.items()}}
    truth, _ = reference.selective_scan(_inputs(tensors, valid, torch.float64), plan)
    half = {k: (t.to(dtype) if k in rounded else t).cuda() for k, t in tensors.items()}
    inputs = ScanInputs(**half, valid=valid.cuda() if valid is not None else None)  # type: ignore[arg-type]
    same, _ = reference.selective_scan(inputs, plan.to("cuda"))
    ours, _ = cuda.triton_scan(inputs, plan.to("cuda"))
    error = _error(same.double().cpu(), truth)
    assert _error(ours.double().cpu(), truth) <= 2 * error + 3e-7


def _inputs(tensors: dict[str, Tensor], valid: Tensor | None, dtype: torch.dtype) -> ScanInputs:
    return ScanInputs(**{k: t.to(dtype) for k, t in tensors.items()}, valid=valid)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow")
@pytest.mark.parametrize("kernel", ["triton", "whichever is chosen"])
def test_scan_is_right_past_65536_tokens(kernel: str) -> None:
    from widefield.ops.selective_scan import cuda

    scan = cuda.triton_scan if kernel == "triton" else cuda.selective_scan
    tensors, valid, plan = _case(1, 70_001, 40, 16, OPTIONS)
    assert valid is not None
    truth = reference.selective_scan(_inputs(tensors, valid, torch.float64), plan)
    same = reference.selective_scan(_inputs(tensors, valid, torch.float32), plan)
    on_gpu = {k: t.cuda() for k, t in tensors.items()}
    ours = scan(ScanInputs(**on_gpu, valid=valid.cuda()), plan.to("cuda"))  # type: ignore[arg-type]
    for value, near, exact in zip(ours, same, truth, strict=True):
        allowed = 2 * _error(near.double(), exact) + 3e-7
        assert _error(value.double().cpu(), exact) <= allowed


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_convolution_and_gradients_are_as_exact_as_the_reference(
    length: int, with_state: bool
) -> None:
    from widefield.ops.causal_conv1d import cuda

    torch.manual_seed(1)
    leaves = [torch.randn(2, length, 20), torch.randn(20, 4), torch.randn(20)]
    state = torch.randn(2, 20, 4) if with_state else None

    def run(conv, dtype, device):
        moved = [t.detach().to(device, dtype).requires_grad_() for t in leaves]
        before = None if state is None else state.to(device, dtype)
        y, last = conv(*moved, silu=True, initial_state=before)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        (y * weight).sum().backward()
        return [t.detach().double().cpu() for t in (y, last, *(m.grad for m in moved))]  # type: ignore[union-attr]

    truth = run(conv_reference.causal_conv1d, torch.float64, "cpu")
    same = run(conv_reference.causal_conv1d, torch.float32, "cpu")
    ours = run(cuda.causal_conv1d, torch.float32, DEVICE)
    for value, near, exact in zip(ours, same, truth, strict=True):
        assert _error(value, exact) <= 2 * _error(near, exact) + 3e-7
