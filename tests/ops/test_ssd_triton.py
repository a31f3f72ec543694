"""The Triton kernels of Mamba-2 against float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.cases import DELTAS, ssd_inputs
from widefield.ops.ssd import chunked, reference
from widefield.plan import LayerPlan, SSDInputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
on_gpu = pytest.mark.gpu
pytestmark = [
    # numpy warns of what a GPU does silently: a product of 0 and infinity behind a mask.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
LEAVES = ("x", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
# The short ones are what CI runs in the interpreter.
LENGTHS = [
    *(pytest.param(length, marks=pytest.mark.triton) for length in (1, 63)),
    *([300] if INTERPRETED else [300, 1000]),
]
HEADS = 4 if INTERPRETED else 32  # the error of four numbers depends on luck
Scan = Callable[[SSDInputs, LayerPlan | None], tuple[Tensor, Tensor]]


def ours(inputs: SSDInputs, plan: LayerPlan | None = None) -> tuple[Tensor, Tensor]:
    from widefield.ops.ssd import cuda

    return cuda.ssd(inputs, plan)


def moved(inputs: SSDInputs, device: str, dtype: torch.dtype | None = None) -> SSDInputs:
    """On a device; floating-point tensors in `dtype` if one is given."""
    tensors = {
        field.name: value.to(device, dtype if value.is_floating_point() else None)
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor)
    }
    return inputs.replace(**tensors)


def wide_plan(plan: LayerPlan | None) -> LayerPlan | None:
    if plan is None:
        return None
    names = ("delta_floor", "delta_scale", "decay_scale")
    return LayerPlan(**{n: None if (v := getattr(plan, n)) is None else v.double() for n in names})


def full_plan(heads: int, rows: int) -> LayerPlan:
    return LayerPlan(
        delta_scale=0.5 + torch.rand(heads),
        decay_scale=0.5 + torch.rand(rows, heads),
        delta_floor=0.01 + 0.05 * torch.rand(heads),
    )


def with_gradients(
    scan: Scan, inputs: SSDInputs, plan: LayerPlan | None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed random sum of them, in float64 on the CPU.

    Its weights are numbers that `dtype` can hold.
    """
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name in LEAVES
        if (value := getattr(inputs, name)) is not None
    }
    y, state = scan(inputs.replace(**leaves), plan)
    generator = torch.Generator().manual_seed(7)
    weights = [
        torch.randn(t.shape, generator=generator).to(dtype).to(t.device, t.dtype)
        for t in (y, state)
    ]
    ((y * weights[0]).double().sum() + (state * weights[1]).double().sum()).backward()
    found = {"y": y, "state": state, **{n: v.grad for n, v in leaves.items()}}
    return {n: v.detach().double().cpu() for n, v in found.items() if v is not None}


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double().cpu() - truth).norm() / truth.norm().clamp_min(1e-30))


def assert_as_exact(
    inputs: SSDInputs, plan: LayerPlan | None = None, truth_by: Scan = reference.ssd
) -> None:
    """Errors of y, state and gradients are at most twice the reference's in the same dtype."""
    dtype = inputs.x.dtype
    truth = with_gradients(truth_by, moved(inputs, "cpu", torch.float64), wide_plan(plan), dtype)
    same = with_gradients(truth_by, inputs, plan, dtype)
    on_device = None if plan is None else plan.to(DEVICE)
    found = with_gradients(ours, moved(inputs, DEVICE), on_device, dtype)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert error(found[name], value) <= 2 * error(same[name], value) + 3e-7, name


@runs_kernels
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("planned", [False, True], ids=["bare", "planned"])
def test_outputs_and_gradients_are_as_exact_as_the_references(length: int, planned: bool) -> None:
    torch.manual_seed(length)
    inputs = ssd_inputs(2, length, HEADS)
    if not planned:
        bare = inputs.replace(D=None, delta_bias=None, initial_state=None)
        return assert_as_exact(bare)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False
    inputs = inputs.replace(valid=valid, delta_limit=(0.02, 0.3))
    return assert_as_exact(inputs, full_plan(HEADS, 2))


@runs_kernels
@pytest.mark.parametrize("delta", DELTAS)
def test_any_delta_is_as_exact_as_in_the_reference(delta: str) -> None:
    if delta == "absurd":
        # Its gradients are infinite or undefined, in the reference, too.
        inputs = ssd_inputs(2, 100, delta=delta)
        truth = reference.ssd(moved(inputs, "cpu", torch.float64))
        same, found = reference.ssd(inputs), ours(moved(inputs, DEVICE))
        for value, near, exact in zip(found, same, truth, strict=True):
            assert error(value, exact) <= 2 * error(near, exact) + 3e-7
    else:
        assert_as_exact(ssd_inputs(2, 100, delta=delta))


@runs_kernels
@pytest.mark.parametrize("shape", [(2, 8, 1, 2, 1), (2, 3, 70, 3, 40), (1, 6, 128, 1, 16)])
def test_any_shape_is_as_exact_as_in_the_reference(shape: tuple[int, ...]) -> None:
    batch, heads, width, groups, state = shape
    inputs = ssd_inputs(batch, 70, heads, width, groups, state)
    turned = inputs.B.transpose(1, -1).contiguous().transpose(1, -1)
    assert_as_exact(inputs.replace(B=turned))


@runs_kernels
def test_sequences_side_by_side_are_each_alone_in_outputs_and_gradients() -> None:
    ends = torch.tensor([0, 0, 5, 75, 75, 76, 170], dtype=torch.int32)
    inputs = ssd_inputs(1, 170, 12, 9, 3, 7)
    inputs = inputs.replace(cu_seqlens=ends, initial_state=torch.randn(6, 12, 9, 7))
    assert_as_exact(inputs)
    assert_as_exact(inputs.replace(initial_state=None), full_plan(12, 6))


@runs_kernels
def test_a_sequence_split_anywhere_is_the_whole() -> None:
    inputs = moved(ssd_inputs(2, 200), DEVICE)
    y, final = ours(inputs)
    for split in (1, 64, 150):
        parts, state = [], inputs.initial_state
        for part in (slice(split), slice(split, None)):
            pieces = {n: getattr(inputs, n)[:, part] for n in ("x", "delta", "B", "C")}
            piece, state = ours(inputs.replace(**pieces, initial_state=state))
            parts.append(piece)
        assert error(torch.cat(parts, dim=1), y.double().cpu()) < 1e-6
        assert state is not None
        assert error(state, final.double().cpu()) < 1e-6


@runs_kernels
def test_nothing_but_frozen_tokens_leaves_the_state_bit_for_bit() -> None:
    inputs = moved(ssd_inputs(2, 200), DEVICE)
    plan = LayerPlan(delta_floor=torch.full((4,), math.inf, device=DEVICE))
    _, state = ours(inputs, plan)
    assert inputs.initial_state is not None
    assert torch.equal(state, inputs.initial_state)
    valid = torch.zeros(2, 200, dtype=torch.bool, device=DEVICE)
    y, state = ours(inputs.replace(valid=valid))
    assert torch.equal(state, inputs.initial_state)
    assert torch.equal(y, torch.zeros_like(y))


@runs_kernels
@pytest.mark.parametrize("name", ["x", "delta", "B"])
@pytest.mark.parametrize("at", [3, 100])
def test_a_value_that_is_no_number_never_vanishes(name: str, at: int) -> None:
    # The decay of 200 tokens leaves nothing of it in any other state.
    inputs = moved(ssd_inputs(1, 200), DEVICE).replace(delta_bias=None, delta_softplus=False)
    inputs = inputs.replace(delta=torch.full_like(inputs.delta, 10.0))
    spoilt = getattr(inputs, name).clone()
    spoilt[0, at] = math.nan
    y, state = ours(inputs.replace(**{name: spoilt}))
    assert y[0, at].isnan().all()
    assert state.isnan().all()
    assert not y[0, : at - at % 64].isnan().any()


@runs_kernels
def test_padding_may_hold_anything() -> None:
    inputs = moved(ssd_inputs(2, 107), DEVICE)
    valid = torch.ones(2, 107, dtype=torch.bool, device=DEVICE)
    valid[1, :17] = False
    clean = ours(inputs.replace(valid=valid))
    spoilt = {n: getattr(inputs, n).clone() for n in ("x", "delta", "B", "C")}
    for tensor in spoilt.values():
        tensor[1, :17] = math.nan
    for ours_, theirs in zip(ours(inputs.replace(**spoilt, valid=valid)), clean, strict=True):
        assert torch.equal(ours_, theirs)


@runs_kernels
def test_fills_the_whole_of_what_it_returns() -> None:
    inputs = moved(ssd_inputs(2, 130, 3, 70, 1, 5), DEVICE)
    torch.use_deterministic_algorithms(True)  # torch then poisons new tensors with NaN
    try:
        found = with_gradients(ours, inputs, full_plan(3, 2).to(DEVICE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in found.values())


@runs_kernels
def test_no_token_at_all_leaves_the_state() -> None:
    inputs = moved(ssd_inputs(2, 5), DEVICE)
    nothing = {n: getattr(inputs, n)[:, :0] for n in ("x", "delta", "B", "C")}
    y, state = ours(inputs.replace(**nothing))
    assert y.shape == (2, 0, 4, 20)
    assert inputs.initial_state is not None
    assert torch.equal(state, inputs.initial_state)


def _narrow(dtype: torch.dtype, *shape: int, delta: str = "random") -> SSDInputs:
    return ssd_inputs(*shape, delta=delta, dtype=dtype)


@on_gpu
@runs_kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bfloat16 otherwise")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", ["random", "heavy tails", "huge", "tiny"])
def test_narrow_inputs_are_as_exact_as_in_the_reference(dtype: torch.dtype, delta: str) -> None:
    assert_as_exact(_narrow(dtype, 2, 300, 8, 64, 2, 128, delta=delta), full_plan(8, 2))


@on_gpu
@runs_kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "state"), [(64, 128), (128, 64), (80, 16), (64, 256)])
def test_the_shapes_of_models_are_as_exact(dtype: torch.dtype, width: int, state: int) -> None:
    assert_as_exact(_narrow(dtype, 1, 300, 8, width, 2, state), truth_by=chunked.ssd)


def _against_chunks(inputs: SSDInputs, plan: LayerPlan | None = None) -> None:
    """y and state of a long sequence; float64 by chunks is the truth, rounded the allowance."""
    truth = chunked.ssd(moved(inputs, DEVICE, torch.float64), wide_plan(plan))
    found = ours(inputs, plan)
    for value, exact in zip(found, truth, strict=True):
        rounded = exact.to(value.dtype)
        exact = exact.cpu()
        assert error(value, exact) <= 2 * error(rounded, exact) + 5e-7


@on_gpu
@runs_kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [65_537, 1_048_577])
def test_long_sequences_stay_exact(dtype: torch.dtype, length: int) -> None:
    inputs = moved(_narrow(dtype, 1, length, 2, 64, 1, 64), DEVICE)
    _against_chunks(inputs)
    if length < 100_000:
        _against_chunks(inputs, LayerPlan(delta_floor=torch.full((2,), 0.1, device=DEVICE)))


@on_gpu
@runs_kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow")
def test_more_than_two_to_the_31_elements_are_read_and_written_right() -> None:
    length, heads, width, groups, state = 280_000, 128, 64, 8, 128
    torch.manual_seed(0)
    shape = {"dtype": torch.bfloat16, "device": DEVICE}
    inputs = SSDInputs(
        x=torch.randn(1, length, heads, width, **shape),
        delta=torch.randn(1, length, heads, **shape) - 3,
        A=-torch.linspace(1, 16, heads, device=DEVICE),
        B=torch.randn(1, length, groups, state, **shape),
        C=torch.randn(1, length, groups, state, **shape),
    )
    assert inputs.x.numel() > 2**31
    y, final = ours(inputs)
    # What lies 3,000 tokens back has decayed to nothing.
    pieces = {n: getattr(inputs, n)[:, -4000:] for n in ("x", "delta", "B", "C")}
    tail = moved(inputs.replace(**pieces), DEVICE, torch.float64)
    truth, state_after = chunked.ssd(tail)
    exact = truth[:, -1000:].cpu()
    assert error(y[:, -1000:], exact) <= 2 * error(exact.bfloat16(), exact)
    assert error(final, state_after.cpu()) <= 5e-7


@on_gpu
@runs_kernels
@pytest.mark.skipif(INTERPRETED, reason="needs much memory")
def test_gradients_past_two_to_the_31_elements_are_right() -> None:
    length, heads, width, state = 280_000, 128, 64, 128
    torch.manual_seed(0)
    shape = {"dtype": torch.bfloat16, "device": DEVICE}
    inputs = SSDInputs(
        x=torch.randn(1, length, heads, width, **shape),
        delta=torch.randn(1, length, heads, **shape) - 3,
        A=-torch.linspace(1, 16, heads, device=DEVICE),
        B=torch.randn(1, length, 1, state, **shape),
        C=torch.randn(1, length, 1, state, **shape),
    )
    dy = torch.randn(1, length, heads, width, **shape)
    names = ("x", "delta", "B", "C")

    def gradients(scan: Scan, inputs: SSDInputs, dy: Tensor) -> list[Tensor]:
        leaves = {n: getattr(inputs, n).detach().requires_grad_() for n in names}
        y, _ = scan(inputs.replace(**leaves), None)
        found = torch.autograd.grad(y, list(leaves.values()), dy)
        return [g[:, -1000:].double().cpu() for g in found]

    assert inputs.x.numel() > 2**31
    found = gradients(ours, inputs, dy)
    # What lies 3,000 tokens back has decayed to nothing.
    pieces = {n: getattr(inputs, n)[:, -4000:] for n in names}
    tail, dy = inputs.replace(**pieces), dy[:, -4000:]
    truth = gradients(chunked.ssd, moved(tail, DEVICE, torch.float64), dy.double())
    same = gradients(chunked.ssd, tail, dy)
    for value, near, exact in zip(found, same, truth, strict=True):
        assert error(value, exact) <= 2 * error(near, exact)
