"""The scans of Mamba-2, of the CPU and by chunks, against the reference and against float64."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.cases import DELTAS, in_float64, raw_delta, ssd_condition, ssd_inputs
from widefield import ops
from widefield.errors import WidefieldError
from widefield.ops.ssd import chunked, cpu, reference
from widefield.ops.ssd._sequences import by_sequence, check_sequences
from widefield.plan import LayerPlan, SSDInputs

Scan = Callable[[SSDInputs, LayerPlan | None], tuple[Tensor, Tensor]]
SCANS = {"cpu": cpu.ssd, "chunked": chunked.ssd}
every_scan = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
SEQUENCES = ("x", "delta", "B", "C")


def floor_at(inputs: SSDInputs, share: float, plan: LayerPlan | None = None) -> Tensor:
    """A floor below which a share of each head's Δ lies; it is itself one of them."""
    delta = ops.effective_delta(inputs, plan).flatten(0, 1)
    rank = min(len(delta) - 1, int(share * len(delta)))
    return delta.sort(dim=0).values[rank].contiguous()


def full_plan(inputs: SSDInputs) -> LayerPlan:
    batch, _, heads = inputs.delta.shape
    scale = LayerPlan(delta_scale=0.5 + torch.rand(heads))
    return LayerPlan(
        delta_scale=scale.delta_scale,
        delta_floor=floor_at(inputs, 0.6, scale).expand(batch, heads).contiguous(),
        decay_scale=0.5 + torch.rand(batch, heads),
    )


def rows_plan(heads: int, rows: int) -> LayerPlan:
    return LayerPlan(
        delta_scale=0.5 + torch.rand(heads),
        decay_scale=0.5 + torch.rand(rows, heads),
        delta_floor=0.01 + 0.05 * torch.rand(heads),
    )


def assert_as_accurate_as_the_reference(
    inputs: SSDInputs,
    plan: LayerPlan | None,
    roundings: int = 1,
    truth_by: Scan = reference.ssd,
    scans: Iterable[str] = SCANS,
) -> None:
    """Largest and mean error against float64, relative to what would be without cancellation.

    So many roundings of a result are always allowed: few results may be exact by luck.
    """
    problem = in_float64(inputs, plan)
    exact, scales = truth_by(*problem), ssd_condition(*problem)
    plain = reference.ssd(inputs, plan)
    for name in scans:
        results = zip(SCANS[name](inputs, plan), plain, exact, scales, strict=True)
        for result, theirs, truth, scale in results:
            assert result.dtype == theirs.dtype
            assert result.shape == theirs.shape
            error = (result.double() - truth).abs() / scale.clamp_min(1e-300)
            allowed = (theirs.double() - truth).abs() / scale.clamp_min(1e-300)
            luck = roundings * torch.finfo(result.dtype).eps / 2
            assert error.max() <= max(2 * allowed.max().item(), luck), name
            assert error.mean() <= max(2 * allowed.mean().item(), luck), name


def cut(inputs: SSDInputs, part: slice, state: Tensor | None) -> SSDInputs:
    pieces = {name: getattr(inputs, name)[:, part] for name in SEQUENCES}
    return inputs.replace(**pieces, initial_state=state)


@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("delta", DELTAS)
def test_error_against_float64_is_at_most_twice_the_references(delta: str, length: int) -> None:
    inputs = ssd_inputs(20 if length == 1 else 2, length, delta=delta)
    assert_as_accurate_as_the_reference(inputs, None)
    assert_as_accurate_as_the_reference(inputs, full_plan(inputs))


@pytest.mark.parametrize(("width", "state"), [(64, 128), (128, 64), (80, 16)])
def test_the_shapes_of_models_are_as_accurate(width: int, state: int) -> None:
    inputs = ssd_inputs(1, 150, 4, width, 1, state)
    assert_as_accurate_as_the_reference(inputs, full_plan(inputs), scans=["cpu"])


def test_error_stays_bounded_past_65536_tokens() -> None:
    inputs = ssd_inputs(1, 65_600, 4, 2, 2, 2)
    delta = torch.cat([inputs.delta[..., :2], raw_delta("constant", 1, 65_600, 2)], dim=-1)
    inputs = inputs.replace(delta=delta, A=torch.tensor([-1.0, -0.01, -0.37, -16.0]))
    plan = LayerPlan(delta_floor=floor_at(inputs, 0.9))  # of the constants, their own value
    assert_as_accurate_as_the_reference(inputs, plan, truth_by=chunked.ssd)


@pytest.mark.parametrize("delta", DELTAS)
def test_chunks_in_float64_are_the_reference_in_float64(delta: str) -> None:
    exact, plan = in_float64(ssd_inputs(2, 300, delta=delta), None)
    scales = ssd_condition(exact, plan)
    results = zip(chunked.ssd(exact), reference.ssd(exact), scales, strict=True)
    for ours, theirs, scale in results:
        assert ours.dtype == torch.float64
        # A chunk's logarithms add up to 64,000 at most: 7e-12 is what that costs a difference.
        assert ((ours - theirs).abs() <= 1e-11 * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_as_accurate_as_in_the_reference(dtype: torch.dtype) -> None:
    inputs = ssd_inputs(2, 200, dtype=dtype)
    assert_as_accurate_as_the_reference(inputs, None)
    assert_as_accurate_as_the_reference(inputs, full_plan(inputs))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 140),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 140), st.integers(1, 40)),
    absent=st.sets(st.sampled_from(["D", "delta_bias", "initial_state"])),
    softplus=st.booleans(),
    limit=st.sampled_from([(0.0, math.inf), (0.02, math.inf), (0.0, 0.1), (0.02, 0.1)]),
    delta=st.sampled_from(DELTAS[:3]),
    planned=st.booleans(),
)
def test_any_shape_any_limit_and_any_absent_input(
    batch: int,
    length: int,
    shape: tuple[int, int, int, int],
    absent: set[str],
    softplus: bool,
    limit: tuple[float, float],
    delta: str,
    planned: bool,
) -> None:
    groups, share, width, state = shape
    inputs = ssd_inputs(batch, length, groups * share, width, groups, state, delta=delta)
    inputs = inputs.replace(**dict.fromkeys(absent), delta_limit=limit)
    if not softplus:
        made = ops.effective_delta(inputs)
        inputs = inputs.replace(delta=made, delta_bias=None, delta_softplus=False)
    plan = full_plan(inputs) if planned else None
    assert_as_accurate_as_the_reference(inputs, plan, roundings=8)


@every_scan
def test_padding_gives_zeros_and_leaves_the_state_even_if_it_holds_nan(scan: Scan) -> None:
    alone, padded = ssd_inputs(1, 90), ssd_inputs(2, 107)
    valid = torch.ones(2, 107, dtype=torch.bool)
    valid[1, :17] = False
    for name in SEQUENCES:
        wide = getattr(padded, name).clone()
        wide[1, :17] = math.nan
        wide[1, 17:] = getattr(alone, name)[0]
        padded = padded.replace(**{name: wide})
    state = torch.cat([padded.initial_state[:1], alone.initial_state])  # type: ignore[index]
    padded = padded.replace(
        valid=valid, initial_state=state, A=alone.A, D=alone.D, delta_bias=alone.delta_bias
    )
    y, final = scan(padded, None)
    y_alone, final_alone = scan(alone, None)
    y_scale, state_scale = ssd_condition(*in_float64(alone, None))
    assert torch.equal(y[1, :17], torch.zeros(17, 4, 20))
    assert ((y[1, 17:] - y_alone[0]).abs() <= 1e-6 * y_scale[0]).all()
    assert ((final[1] - final_alone[0]).abs() <= 1e-6 * state_scale[0]).all()


@every_scan
def test_nothing_but_padding_leaves_the_state_bit_for_bit(scan: Scan) -> None:
    inputs = ssd_inputs(2, 100)
    y, state = scan(inputs.replace(valid=torch.zeros(2, 100, dtype=torch.bool)), None)
    assert inputs.initial_state is not None
    assert torch.equal(state, inputs.initial_state)
    assert torch.equal(y, torch.zeros_like(y))


@every_scan
def test_no_floor_is_bit_for_bit_a_floor_of_zero(scan: Scan) -> None:
    for delta in DELTAS:
        inputs = ssd_inputs(delta=delta)
        y, state = scan(inputs, None)
        y_zero, state_zero = scan(inputs, LayerPlan(delta_floor=torch.zeros(4)))
        assert torch.equal(y, y_zero)
        assert torch.equal(state, state_zero)


@every_scan
@pytest.mark.parametrize("shape", [(1, 700, 4), (2, 63, 6), (1, 1, 2)])
def test_a_constant_delta_exactly_at_its_floor_is_kept_and_below_it_is_frozen(
    scan: Scan, shape: tuple[int, int, int]
) -> None:
    inputs = ssd_inputs(*shape).replace(delta=torch.full(shape, -2.345), delta_bias=None)
    # torch's softplus of the last few items of a tensor may differ in the last place.
    floor = ops.effective_delta(inputs).amin(dim=(0, 1))
    _, free = scan(inputs, None)
    _, kept = scan(inputs, LayerPlan(delta_floor=floor))
    assert torch.equal(kept, free)
    above = torch.nextafter(ops.effective_delta(inputs).amax(dim=(0, 1)), torch.tensor(1.0))
    _, frozen = scan(inputs, LayerPlan(delta_floor=above))
    assert inputs.initial_state is not None
    assert torch.equal(frozen, inputs.initial_state)


@every_scan
def test_freezes_the_same_tokens_as_the_reference_where_floors_are_values_of_delta(
    scan: Scan,
) -> None:
    inputs = ssd_inputs(3, 333, 6)
    scale = LayerPlan(delta_scale=0.5 + torch.rand(3, 6))
    for share in (0.0, 0.3, 0.9, 1.0):
        floor = floor_at(inputs, share, scale)
        plan = LayerPlan(delta_floor=floor, delta_scale=scale.delta_scale)
        # One state that never forgets and counts what was let in.
        counting = inputs.replace(
            x=torch.ones(3, 333, 6, 1), A=torch.zeros(6), B=torch.ones(3, 333, 2, 1),
            C=torch.ones(3, 333, 2, 1), D=None, initial_state=None,
        )  # fmt: skip
        delta = ops.effective_delta(inputs, plan)
        counted = scan(counting, plan)[0][..., 0].double()
        expected = delta.double().cumsum(1)
        assert ((counted - expected).abs() <= 1e-5 * expected).all()
        # A frozen token adds nothing at all; the least of the others can be told from that.
        steps = counted.diff(dim=1, prepend=torch.zeros(3, 1, 6)) > delta[delta > 0].min() / 2
        assert torch.equal(steps, delta != 0)


def test_a_nan_delta_comes_out_as_nan_with_or_without_a_floor_and_never_earlier() -> None:
    for at in (5, 70, 127):
        inputs = ssd_inputs(1, 130)
        delta = inputs.delta.clone()
        delta[0, at, 3] = math.nan
        inputs = inputs.replace(delta=delta)
        for plan in (None, LayerPlan(delta_floor=torch.full((4,), 0.05))):
            y, state = cpu.ssd(inputs, plan)
            touched = torch.zeros(130, 4, dtype=torch.bool)
            touched[at:, 3] = True
            assert torch.equal(y[0].isnan().all(-1), touched)
            assert torch.equal(y[0].isnan().any(-1), touched)
            assert state[0, 3].isnan().all()
            assert not state[0, :3].isnan().any()


@pytest.mark.parametrize("name", ["x", "B", "C"])
def test_no_token_reads_what_comes_after_it_even_if_that_is_nan(name: str) -> None:
    inputs = ssd_inputs(1, 130)
    y, _ = cpu.ssd(inputs)
    for at in (6, 64, 67, 129):
        spoilt = getattr(inputs, name).clone()
        spoilt[0, at] = math.nan
        touched, state = cpu.ssd(inputs.replace(**{name: spoilt}))
        assert torch.equal(touched[0, :at], y[0, :at])
        assert touched[0, at].isnan().all()
        assert state.isnan().all() == (name != "C")


@every_scan
@pytest.mark.parametrize("value", [1e4, 1e30])
def test_a_huge_delta_forgets_everything_before_it(scan: Scan, value: float) -> None:
    inputs = ssd_inputs(1, 3, 2, 8, 1).replace(delta=torch.full((1, 3, 2), value), delta_bias=None)
    _, state = scan(inputs, None)
    written = value * inputs.x[:, -1, :, :, None]
    assert torch.equal(state, written * inputs.B[:, -1, :, None])


@every_scan
def test_what_follows_an_absurd_delta_in_its_chunk_decays_as_ever(scan: Scan) -> None:
    inputs = ssd_inputs(1, 20).replace(delta_bias=None, delta_softplus=False)
    delta = torch.rand(1, 20, 4)
    delta[0, 7] = 1e30
    inputs = inputs.replace(delta=delta)
    after, final = scan(inputs, None)
    rest = cut(inputs, slice(8, None), scan(cut(inputs, slice(8), None), None)[1])
    y, state = scan(rest, None)
    torch.testing.assert_close(after[:, 8:], y, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(final, state, rtol=1e-5, atol=1e-30)


@every_scan
@pytest.mark.parametrize("value", [-2.0, 88.0])
def test_negative_and_large_delta_do_what_they_do_in_the_reference(
    scan: Scan, value: float
) -> None:
    inputs = ssd_inputs(1, 3, 4, 8, 2, 4).replace(delta_bias=None, delta_softplus=False)
    delta = inputs.delta.abs()
    delta[0, 1, 2] = value
    inputs = inputs.replace(delta=delta)
    for ours, theirs in zip(scan(inputs, None), reference.ssd(inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_infinite_delta_spoils_what_it_spoils_in_the_reference() -> None:
    inputs = ssd_inputs(1, 3).replace(delta_bias=None, delta_softplus=False)
    delta = inputs.delta.abs()
    delta[0, 1, 2] = math.inf
    inputs = inputs.replace(delta=delta)
    for ours, theirs in zip(cpu.ssd(inputs), reference.ssd(inputs), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-5, atol=1e-5)


@every_scan
@given(split=st.integers(1, 199))
def test_a_sequence_split_anywhere_is_the_whole(scan: Scan, split: int) -> None:
    inputs = ssd_inputs(2, 200)
    y, final = scan(inputs, None)
    first, state = scan(cut(inputs, slice(split), inputs.initial_state), None)
    second, state = scan(cut(inputs, slice(split, None), state), None)
    y_scale, state_scale = ssd_condition(*in_float64(inputs, None))
    assert ((torch.cat([first, second], dim=1) - y).abs() <= 1e-6 * y_scale).all()
    assert ((state - final).abs() <= 1e-6 * state_scale).all()


def test_a_sequence_split_between_chunks_is_bit_for_bit_the_whole() -> None:
    inputs = ssd_inputs(2, 1300)
    y, final = cpu.ssd(inputs)
    parts, state = [], inputs.initial_state
    for start, stop in ((0, 64), (64, 1088), (1088, 1300)):
        part, state = cpu.ssd(cut(inputs, slice(start, stop), state))
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1), y)
    assert state is not None
    assert torch.equal(state, final)


@every_scan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fills_the_whole_of_its_output_and_leaves_its_inputs_alone(
    scan: Scan, dtype: torch.dtype
) -> None:
    inputs = ssd_inputs(2, 1030, 3, 70, 1, 5, dtype=dtype)
    before = dataclasses.replace(
        inputs, **{n: getattr(inputs, n).clone() for n in (*SEQUENCES, "initial_state")}
    )
    torch.use_deterministic_algorithms(True)  # torch then poisons new tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        y, state = scan(inputs, full_plan(inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert state.isfinite().all()
    for name in (*SEQUENCES, "initial_state"):
        assert torch.equal(getattr(inputs, name), getattr(before, name))


@every_scan
def test_a_last_dimension_with_a_stride_is_read_right(scan: Scan) -> None:
    inputs = ssd_inputs(2, 20)
    turned = {
        name: getattr(inputs, name).transpose(1, -1).contiguous().transpose(1, -1)
        for name in SEQUENCES
    }
    dense = {name: getattr(inputs, name).contiguous() for name in SEQUENCES}
    results = zip(
        scan(inputs.replace(**turned), None), scan(inputs.replace(**dense), None), strict=True
    )
    for ours, theirs in results:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Storages(TorchDispatchMode):
    """Bytes of each storage that an operation of torch makes in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beside_the_output_does_not_grow_with_the_length(dtype: torch.dtype) -> None:
    largest = []
    for length in (4096, 8192):
        inputs = ssd_inputs(1, length, 1, 48, 1, 40, dtype=dtype)
        inputs = inputs.replace(valid=torch.ones(1, length, dtype=torch.bool))
        given_or_made = {getattr(inputs, n).untyped_storage().nbytes() for n in SEQUENCES}
        given_or_made.add(inputs.x.numel() * dtype.itemsize)
        with Storages() as storages:
            cpu.ssd(inputs)
        largest.append(max(b for b in storages.bytes if b not in given_or_made))
    assert largest[0] == largest[1]


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    inputs = ssd_inputs(3, 200, 6)
    plan = LayerPlan(delta_floor=floor_at(inputs, 0.5))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(cpu.ssd(inputs, plan))
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


def test_two_python_threads_scan_at_once_and_both_are_right() -> None:
    torch.set_num_threads(2)
    problems = [ssd_inputs(2, 300) for _ in range(2)]
    expected = [cpu.ssd(inputs)[0] for inputs in problems]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(20):
            if not torch.equal(cpu.ssd(problems[which])[0], expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@every_scan
def test_autocast_changes_nothing(scan: Scan) -> None:
    inputs = ssd_inputs(1, 100)
    y, state = scan(inputs, None)
    with torch.autocast("cpu", torch.bfloat16):
        y_inside, state_inside = scan(inputs, None)
    assert torch.equal(y, y_inside)
    assert torch.equal(state, state_inside)


def test_weights_that_want_gradients_and_inference_mode_are_fine_without_autograd() -> None:
    inputs = ssd_inputs(1, 20, dtype=torch.bfloat16)
    inputs = inputs.replace(A=inputs.A.requires_grad_(), D=inputs.D.requires_grad_())  # type: ignore[union-attr]
    y, _ = cpu.ssd(inputs)
    assert not y.requires_grad
    with torch.inference_mode():
        made = inputs.replace(x=inputs.x * 1, delta=inputs.delta * 1)
        assert torch.equal(ops.ssd(made)[0], y)


def test_dispatch_takes_the_kernel_where_it_can_and_chunks_elsewhere() -> None:
    inputs = ssd_inputs(1, 100)
    exact, _ = in_float64(inputs, None)
    assert torch.equal(ops.ssd(inputs)[0], cpu.ssd(inputs)[0])
    assert torch.equal(ops.ssd(exact)[0], chunked.ssd(exact)[0])
    leaf = inputs.x.clone().requires_grad_()
    y, _ = ops.ssd(inputs.replace(x=leaf))
    assert y.requires_grad
    assert torch.equal(y, chunked.ssd(inputs)[0])
    with ops.use_backend("reference"):
        assert torch.equal(ops.ssd(inputs)[0], reference.ssd(inputs)[0])


def gradients(
    scan: Scan, inputs: SSDInputs, plan: LayerPlan | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed random sum of them."""
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
    leaves = {
        n: v.detach().to(dtype).requires_grad_()
        for n in names
        if (v := getattr(inputs, n)) is not None
    }
    y, state = scan(inputs.replace(**leaves), plan)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator) for t in (y, state)]
    ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return {"y": y, "state": state, **{n: v.grad for n, v in leaves.items()}}  # type: ignore[dict-item]


@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("delta", ["random", "tiny", "huge", "heavy tails"])
def test_gradients_of_the_chunks_are_as_exact_as_those_of_the_reference(
    delta: str, length: int
) -> None:
    inputs = ssd_inputs(2, length, delta=delta)
    inputs = inputs.replace(delta_limit=(0.0, 0.3))
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False
    for part in (inputs, inputs.replace(D=None, initial_state=None, valid=valid)):
        scale, decay = 0.5 + torch.rand(4), 0.5 + torch.rand(2, 4)
        plan = LayerPlan(delta_scale=scale, decay_scale=decay, delta_floor=torch.full((4,), 0.01))
        truth = gradients(reference.ssd, part, plan, torch.float64)
        same = gradients(reference.ssd, part, plan, torch.float32)
        wide = gradients(chunked.ssd, part, plan, torch.float64)
        ours = gradients(chunked.ssd, part, plan, torch.float32)
        for name, value in truth.items():
            size = value.norm().clamp_min(1e-300)
            assert (wide[name] - value).norm() <= 1e-12 * size, name
            allowed = (same[name] - value).norm()
            assert (ours[name] - value).norm() <= 2 * allowed + 3e-7 * size, name


def test_sequences_side_by_side_are_each_alone_in_plain_torch() -> None:
    ends = torch.tensor([0, 0, 5, 135, 135, 136, 200])
    inputs = ssd_inputs(1, 200).replace(cu_seqlens=ends, initial_state=torch.randn(6, 4, 20, 18))
    plan = rows_plan(4, 6)
    y, states = reference.ssd(inputs, plan)
    assert states.shape == (6, 4, 20, 18)
    assert inputs.initial_state is not None
    assert torch.equal(states[0], inputs.initial_state[0])
    part = inputs.replace(
        **{n: getattr(inputs, n)[:, 5:135] for n in ("x", "delta", "B", "C")},
        initial_state=inputs.initial_state[2:3],
        cu_seqlens=None,
    )
    assert plan.decay_scale is not None
    alone = LayerPlan(plan.delta_floor, plan.delta_scale, plan.decay_scale[2])
    expected, state = reference.ssd(part, alone)
    assert torch.equal(y[:, 5:135], expected)
    assert torch.equal(states[2], state[0])
    for scan in (cpu.ssd, chunked.ssd):
        for found, theirs in zip(scan(inputs, plan), (y, states), strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_sequences_that_make_no_sense_are_refused() -> None:
    inputs = ssd_inputs(1, 10)
    for ends, said in (
        (torch.tensor([0.0, 10.0]), "int32 or int64"),
        (torch.tensor([[0, 10]]), "int32 or int64"),
        (torch.tensor([0, 9]), "ascending from 0 to 10"),
        (torch.tensor([1, 10]), "ascending from 0 to 10"),
        (torch.tensor([0, 7, 5, 10]), "ascending from 0 to 10"),
    ):
        with pytest.raises(WidefieldError, match=said):
            by_sequence(reference.ssd, dataclasses.replace(inputs, cu_seqlens=ends), None)
    both = inputs.replace(
        cu_seqlens=torch.tensor([0, 10]), valid=torch.ones(1, 10, dtype=torch.bool)
    )
    with pytest.raises(WidefieldError, match="together with valid"):
        check_sequences(both)
    with pytest.raises(WidefieldError, match="batch of 2"):
        check_sequences(ssd_inputs(2, 10).replace(cu_seqlens=torch.tensor([0, 10])))
