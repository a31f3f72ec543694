"""The scan of the CPU against the reference and against float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import DELTAS, condition, in_float64, raw_delta, scan_inputs
from widefield import WidefieldError, ops
from widefield.ops.selective_scan import cpu, reference
from widefield.plan import LayerPlan, ScanInputs

Scan = Callable[[ScanInputs, LayerPlan], tuple[Tensor, Tensor]]


def floor_at(inputs: ScanInputs, share: float, plan: LayerPlan | None = None) -> Tensor:
    """A floor below which a share of each channel's Δ lies; it is itself one of them."""
    delta = reference.effective_delta(inputs, plan).flatten(0, 1)
    rank = min(len(delta) - 1, int(share * len(delta)))
    return delta.sort(dim=0).values[rank].contiguous()


def full_plan(inputs: ScanInputs) -> LayerPlan:
    batch, _, channels = inputs.x.shape
    scale = LayerPlan(delta_scale=0.5 + torch.rand(channels))
    return LayerPlan(
        delta_scale=scale.delta_scale,
        delta_floor=floor_at(inputs, 0.6, scale).expand(batch, channels).contiguous(),
        decay_scale=0.5 + torch.rand(batch, channels),
    )


def assert_as_accurate_as_the_reference(
    inputs: ScanInputs, plan: LayerPlan | None, roundings: int = 1
) -> None:
    """Largest and mean error against float64, relative to what would be without cancellation.

    So many roundings of a result are always allowed: few results may be exact by luck.
    """
    problem = in_float64(inputs, plan)
    exact, scales = reference.selective_scan(*problem), condition(*problem)
    plain = reference.selective_scan(inputs, plan)
    for result, theirs, truth, scale in zip(
        cpu.selective_scan(inputs, plan), plain, exact, scales, strict=True
    ):
        assert result.dtype == theirs.dtype
        error = (result.double() - truth).abs() / scale.clamp_min(1e-300)
        allowed = (theirs.double() - truth).abs() / scale.clamp_min(1e-300)
        luck = roundings * torch.finfo(result.dtype).eps / 2
        assert error.max() <= max(2 * allowed.max().item(), luck)
        assert error.mean() <= max(2 * allowed.mean().item(), luck)


@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("delta", DELTAS)
def test_error_against_float64_is_at_most_twice_the_references(delta: str, length: int) -> None:
    inputs = scan_inputs(20 if length == 1 else 2, length, 24, delta=delta)
    assert_as_accurate_as_the_reference(inputs, None)
    assert_as_accurate_as_the_reference(inputs, full_plan(inputs))


def test_error_stays_bounded_past_65536_tokens() -> None:
    inputs = scan_inputs(1, 65_600, 4, 2)
    delta = torch.cat([inputs.delta[..., :2], raw_delta("constant", 1, 65_600, 2)], dim=-1)
    rates = torch.tensor([[-1.0, -0.01], [-0.37, -16.0]]).repeat(2, 1)
    inputs = inputs.replace(delta=delta, A=rates)
    floor = floor_at(inputs, 0.9)  # the constants' own value
    assert_as_accurate_as_the_reference(inputs, LayerPlan(delta_floor=floor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_as_accurate_as_in_the_reference(dtype: torch.dtype) -> None:
    inputs = scan_inputs(2, 700, 24, dtype=dtype)
    assert_as_accurate_as_the_reference(inputs, None)
    assert_as_accurate_as_the_reference(inputs, full_plan(inputs))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    channels=st.integers(1, 150),
    state=st.integers(1, 20),
    absent=st.sets(st.sampled_from(["z", "D", "delta_bias", "initial_state"])),
    softplus=st.booleans(),
    delta=st.sampled_from(DELTAS[:3]),
    planned=st.booleans(),
)
def test_any_shape_and_any_absent_input(
    batch: int,
    length: int,
    channels: int,
    state: int,
    absent: set[str],
    softplus: bool,
    delta: str,
    planned: bool,
) -> None:
    inputs = scan_inputs(batch, length, channels, state, delta=delta)
    inputs = inputs.replace(**dict.fromkeys(absent))
    if not softplus:
        made = reference.effective_delta(inputs)
        inputs = inputs.replace(delta=made, delta_bias=None, delta_softplus=False)
    plan = full_plan(inputs) if planned else None
    assert_as_accurate_as_the_reference(inputs, plan, roundings=8)


def test_padding_gives_zeros_and_leaves_the_state_even_if_it_holds_nan() -> None:
    alone = scan_inputs(1, 30, 40)
    padded = scan_inputs(2, 37, 40)
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[1, :7] = False
    for name in ("x", "z", "delta", "B", "C"):
        wide = getattr(padded, name).clone()
        wide[1, :7] = math.nan
        wide[1, 7:] = getattr(alone, name)[0]
        padded = padded.replace(**{name: wide})
    state = torch.cat([padded.initial_state[:1], alone.initial_state])  # type: ignore[index]
    padded = padded.replace(
        valid=valid, initial_state=state, A=alone.A, D=alone.D, delta_bias=alone.delta_bias
    )
    y, final = cpu.selective_scan(padded)
    y_alone, final_alone = cpu.selective_scan(alone)
    assert torch.equal(y[1, :7], torch.zeros(7, 40))
    assert torch.equal(y[1, 7:], y_alone[0])
    assert torch.equal(final[1], final_alone[0])


def test_no_floor_is_bit_for_bit_a_floor_of_zero() -> None:
    for delta in DELTAS:
        inputs = scan_inputs(delta=delta)
        y, state = cpu.selective_scan(inputs)
        y_zero, state_zero = cpu.selective_scan(inputs, LayerPlan(delta_floor=torch.zeros(40)))
        assert torch.equal(y, y_zero)
        assert torch.equal(state, state_zero)


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((1, 700, 64), 0),
        ((2, 63, 40), 0),
        ((1, 700, 64), 1 << 20),
        ((2, 63, 40), 1 << 20),
        ((1, 1, 1), 1 << 20),
    ],
)
def test_a_constant_delta_exactly_at_its_floor_is_kept_and_below_it_is_frozen(
    shape: tuple[int, int, int], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SMALL", small)
    inputs = scan_inputs(*shape).replace(delta=torch.full(shape, -2.345), delta_bias=None)
    # torch's softplus of the last few items of a tensor may differ in the last place.
    floor = reference.effective_delta(inputs).amin(dim=(0, 1))
    _, free = cpu.selective_scan(inputs)
    _, kept = cpu.selective_scan(inputs, LayerPlan(delta_floor=floor))
    assert torch.equal(kept, free)
    above = torch.nextafter(reference.effective_delta(inputs).amax(dim=(0, 1)), torch.tensor(1.0))
    _, frozen = cpu.selective_scan(inputs, LayerPlan(delta_floor=above))
    assert inputs.initial_state is not None
    assert torch.equal(frozen, inputs.initial_state)


def test_freezes_the_same_tokens_as_the_reference_where_floors_are_values_of_delta() -> None:
    inputs = scan_inputs(3, 333, 37)
    scale = LayerPlan(delta_scale=0.5 + torch.rand(3, 37))
    for share in (0.0, 0.3, 0.9, 1.0):
        floor = floor_at(inputs, share, scale)
        plan = LayerPlan(delta_floor=floor, delta_scale=scale.delta_scale)
        # One state that never forgets and counts what was let in.
        counting = inputs.replace(
            x=torch.ones(3, 333, 37), A=torch.zeros(37, 1), B=torch.ones(3, 333, 1),
            C=torch.ones(3, 333, 1), D=None, z=None, initial_state=None,
        )  # fmt: skip
        steps = cpu.selective_scan(counting, plan)[0].diff(dim=1) != 0
        assert torch.equal(steps, (reference.effective_delta(inputs, plan) != 0)[:, 1:])


def test_a_nan_delta_comes_out_as_nan_with_or_without_a_floor() -> None:
    inputs = scan_inputs(1, 20, 40)
    delta = inputs.delta.clone()
    delta[0, 5, 3] = math.nan
    inputs = inputs.replace(delta=delta)
    for plan in (None, LayerPlan(delta_floor=torch.full((40,), 0.05))):
        y, state = cpu.selective_scan(inputs, plan)
        touched = torch.zeros(20, 40, dtype=torch.bool)
        touched[5:, 3] = True
        assert torch.equal(y[0].isnan(), touched)
        assert state[0, 3].isnan().all()
        assert state[0].isnan().any(1).sum() == 1


@pytest.mark.parametrize("value", [1e4, 1e30])
def test_a_huge_delta_forgets_everything_before_it(value: float) -> None:
    inputs = scan_inputs(1, 3, 8).replace(delta=torch.full((1, 3, 8), value), delta_bias=None)
    _, state = cpu.selective_scan(inputs)
    assert torch.equal(state, (value * inputs.x[:, -1, :, None]) * inputs.B[:, -1, None])


@pytest.mark.parametrize("value", [math.inf, -5.0, 88.0])
def test_infinite_and_negative_delta_do_what_they_do_in_the_reference(value: float) -> None:
    inputs = scan_inputs(1, 3, 20, 4).replace(delta_bias=None, delta_softplus=False)
    delta = inputs.delta.abs()
    delta[0, 1, 7] = value
    inputs = inputs.replace(delta=delta, z=None)
    for ours, theirs in zip(
        cpu.selective_scan(inputs), reference.selective_scan(inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_sequence_in_pieces_is_bit_for_bit_the_whole() -> None:
    inputs = scan_inputs(2, 1100, 40)
    y, final = cpu.selective_scan(inputs)
    parts, state = [], inputs.initial_state
    for start, stop in ((0, 1), (1, 514), (514, 1100)):
        names = ("x", "z", "delta", "B", "C")
        piece = {name: getattr(inputs, name)[:, start:stop] for name in names}
        part, state = cpu.selective_scan(inputs.replace(**piece, initial_state=state))
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1), y)
    assert state is not None
    assert torch.equal(state, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fills_the_whole_of_its_output_and_leaves_its_inputs_alone(dtype: torch.dtype) -> None:
    inputs = scan_inputs(2, 530, 70, dtype=dtype)
    before = [t.clone() for t in (inputs.x, inputs.delta, inputs.B, inputs.initial_state)]  # type: ignore[union-attr]
    torch.use_deterministic_algorithms(True)  # torch then poisons new tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        y, state = cpu.selective_scan(inputs, full_plan(inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert state.isfinite().all()
    after = (inputs.x, inputs.delta, inputs.B, inputs.initial_state)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))  # type: ignore[arg-type]


def test_a_last_dimension_with_a_stride_is_read_right() -> None:
    inputs = scan_inputs(2, 20, 24)
    turned = {
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("x", "z", "delta", "B", "C")
    }
    for ours, theirs in zip(
        cpu.selective_scan(inputs.replace(**turned)), cpu.selective_scan(inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    inputs = scan_inputs(3, 200, 150)
    plan = LayerPlan(delta_floor=floor_at(inputs, 0.5))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(cpu.selective_scan(inputs, plan))
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


def test_two_python_threads_scan_at_once_and_both_are_right() -> None:
    torch.set_num_threads(2)
    problems = [scan_inputs(2, 300, 150) for _ in range(2)]
    expected = [cpu.selective_scan(inputs)[0] for inputs in problems]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(20):
            if not torch.equal(cpu.selective_scan(problems[which])[0], expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_weights_that_want_gradients_and_inference_mode_are_fine_without_autograd() -> None:
    inputs = scan_inputs(1, 20, 24, dtype=torch.bfloat16)
    inputs = inputs.replace(A=inputs.A.requires_grad_(), D=inputs.D.requires_grad_())  # type: ignore[union-attr]
    y, _ = cpu.selective_scan(inputs)
    assert not y.requires_grad
    with torch.inference_mode():
        made = inputs.replace(x=inputs.x * 1, delta=inputs.delta * 1)
        assert torch.equal(ops.selective_scan(made)[0], y)


def test_dispatch_takes_the_cpu_kernel_unless_gradients_or_float64_are_wanted() -> None:
    inputs = scan_inputs(1, 9, 24)
    exact, _ = in_float64(inputs, None)
    assert torch.equal(ops.selective_scan(inputs)[0], cpu.selective_scan(inputs)[0])
    assert ops.selective_scan(exact)[0].dtype == torch.float64
    leaf = inputs.x.clone().requires_grad_()
    assert ops.selective_scan(inputs.replace(x=leaf))[0].requires_grad


def side_by_side(*lengths: int, channels: int = 24) -> tuple[ScanInputs, LayerPlan]:
    """Sequences in one row, with a state and a plan for each."""
    inputs = scan_inputs(1, sum(lengths), channels)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    plan = LayerPlan(
        delta_floor=torch.rand(len(lengths), channels) * 0.1,
        delta_scale=0.5 + torch.rand(channels),
        decay_scale=0.5 + torch.rand(len(lengths), channels),
    )
    state = torch.randn(len(lengths), channels, 16)
    return inputs.replace(initial_state=state, cu_seqlens=ends), plan


def one_of(inputs: ScanInputs, plan: LayerPlan, index: int) -> tuple[ScanInputs, LayerPlan]:
    assert inputs.cu_seqlens is not None and inputs.initial_state is not None
    tokens = slice(*inputs.cu_seqlens.tolist()[index : index + 2])
    cut = {name: getattr(inputs, name)[:, tokens] for name in ("x", "delta", "B", "C", "z")}
    state = inputs.initial_state[index : index + 1]
    assert plan.delta_floor is not None and plan.decay_scale is not None
    own = LayerPlan(plan.delta_floor[index], plan.delta_scale, plan.decay_scale[index])
    return inputs.replace(**cut, initial_state=state, cu_seqlens=None), own


@pytest.mark.parametrize("scan", [reference.selective_scan, cpu.selective_scan, ops.selective_scan])
def test_sequences_side_by_side_are_scanned_as_if_alone(scan: Scan) -> None:
    inputs, plan = side_by_side(30, 1, 66)
    y, state = scan(inputs, plan)
    assert inputs.cu_seqlens is not None
    for index, (first, last) in enumerate(pairwise(inputs.cu_seqlens.tolist())):
        alone, final = scan(*one_of(inputs, plan, index))
        assert torch.equal(y[:, first:last], alone)
        assert torch.equal(state[index], final[0])


@pytest.mark.parametrize("scan", [reference.selective_scan, cpu.selective_scan])
def test_an_empty_sequence_keeps_its_state(scan: Scan) -> None:
    inputs, plan = side_by_side(0, 20, 0)
    y, state = scan(inputs, plan)
    assert inputs.initial_state is not None
    assert y.shape == inputs.x.shape
    assert torch.equal(state[::2], inputs.initial_state[::2])


def test_gradients_stay_within_their_sequence() -> None:
    inputs, plan = side_by_side(20, 30)
    leaf = inputs.x.clone().requires_grad_()
    y, _ = ops.selective_scan(inputs.replace(x=leaf), plan)
    y[:, 20:].sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[:, :20].any() and leaf.grad[:, 20:].all()


def test_groups_of_channels_take_sequences_side_by_side() -> None:
    inputs, plan = side_by_side(20, 30)
    B, C = (torch.randn(1, 50, 2, 16) for _ in range(2))
    y, state = ops.selective_scan(inputs.replace(B=B, C=C), plan)
    assert y.shape == (1, 50, 24) and state.shape == (2, 24, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0.0, 50.0])}, "float32 of shape"),
        ({"cu_seqlens": torch.tensor([0])}, "of shape"),
        ({"cu_seqlens": torch.tensor([[0, 50]])}, "of shape"),
        ({"cu_seqlens": torch.tensor([0, 50]).short()}, "int16"),
        ({"cu_seqlens": torch.tensor([0, 20, 50, 50])}, "has 2 rows, expected 3"),
        ({"cu_seqlens": torch.tensor([0, 30, 20]), "initial_state": None}, "ascending"),
        ({"cu_seqlens": torch.tensor([1, 20, 50])}, "ascending"),
        ({"cu_seqlens": torch.tensor([0, 20, 49])}, "to the length 50"),
        ({"valid": torch.ones(1, 50, dtype=torch.bool)}, "together with valid"),
    ],
)
def test_ends_of_sequences_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], message: str
) -> None:
    inputs, plan = side_by_side(20, 30)
    for name, value in changes.items():  # past the checks of shapes that only tests have
        object.__setattr__(inputs, name, value)
    with pytest.raises(WidefieldError, match=message):
        ops.selective_scan(inputs, plan)


def test_several_rows_of_sequences_side_by_side_are_refused() -> None:
    inputs = scan_inputs(2, 20, 24).replace(cu_seqlens=torch.tensor([0, 10, 20]))
    with pytest.raises(WidefieldError, match="2 rows, expected 1"):
        ops.selective_scan(inputs)
