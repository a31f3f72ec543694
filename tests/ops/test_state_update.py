"""The decode step of the CPU against the reference and against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import DELTAS, scan_inputs
from widefield.ops.selective_scan import cpu as scan
from widefield.ops.state_update import cpu, reference
from widefield.plan import ScanInputs


def arguments(inputs: ScanInputs, at: int = 0) -> tuple[Tensor | None, ...]:
    """One token of a scan's inputs as the arguments of a step, without the state."""
    return (
        inputs.x[:, at],
        inputs.delta[:, at],
        inputs.A,
        inputs.B[:, at],
        inputs.C[:, at],
        inputs.D,
        None if inputs.z is None else inputs.z[:, at],
        inputs.delta_bias,
    )


def state_of(inputs: ScanInputs) -> Tensor:
    assert inputs.initial_state is not None
    return inputs.initial_state.clone()


def assert_as_accurate_as_the_reference(inputs: ScanInputs) -> None:
    softplus = inputs.delta_softplus
    ours, theirs, exact = state_of(inputs), state_of(inputs), state_of(inputs).double()
    y = cpu.selective_state_update(ours, *arguments(inputs), delta_softplus=softplus)  # type: ignore[arg-type]
    y_theirs = reference.selective_state_update(
        theirs,
        *arguments(inputs),  # type: ignore[arg-type]
        delta_softplus=softplus,
    )
    wide = tuple(None if a is None else a.double() for a in arguments(inputs))
    y_exact = reference.selective_state_update(exact, *wide, delta_softplus=softplus)  # type: ignore[arg-type]
    assert y.dtype == y_theirs.dtype
    for result, plain, truth in ((y, y_theirs, y_exact), (ours, theirs, exact)):
        few_roundings = 8 * truth.abs().max().item() * torch.finfo(result.dtype).eps / 2
        error, allowed = (result - truth).abs().max(), (plain - truth).abs().max().item()
        assert error <= max(2 * allowed, few_roundings)


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 80),
    size=st.integers(1, 40),
    absent=st.sets(st.sampled_from(["z", "D", "delta_bias"])),
    softplus=st.booleans(),
    delta=st.sampled_from(DELTAS[:3]),
)
def test_any_shape_and_any_absent_input(
    batch: int, channels: int, size: int, absent: set[str], softplus: bool, delta: str
) -> None:
    inputs = scan_inputs(batch, 1, channels, size, delta=delta).replace(**dict.fromkeys(absent))
    if not softplus:
        inputs = inputs.replace(delta=inputs.delta.abs(), delta_softplus=False)
    assert_as_accurate_as_the_reference(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    assert_as_accurate_as_the_reference(scan_inputs(2, 1, 40, dtype=dtype))


def test_steps_walk_the_same_way_as_the_scan() -> None:
    inputs = scan_inputs(2, 300, 40)
    y, final = scan.selective_scan(inputs)
    state = state_of(inputs)
    for t in range(300):
        step = cpu.selective_state_update(state, *arguments(inputs, t))  # type: ignore[arg-type]
        torch.testing.assert_close(step, y[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_a_nan_delta_comes_out_as_nan_in_its_own_channel_only() -> None:
    inputs = scan_inputs(1, 1, 20)
    inputs.delta[0, 0, 3] = torch.nan
    state = state_of(inputs)
    y = cpu.selective_state_update(state, *arguments(inputs))  # type: ignore[arg-type]
    assert y[0].isnan().nonzero().flatten().tolist() == [3]
    assert state[0].isnan().all(1).nonzero().flatten().tolist() == [3]


def test_a_state_that_the_kernel_cannot_write_is_updated_all_the_same() -> None:
    inputs = scan_inputs(2, 1, 20)
    dense = state_of(inputs)
    strided = state_of(inputs).transpose(1, 2).contiguous().transpose(1, 2)
    for state in (dense, strided):
        cpu.selective_state_update(state, *arguments(inputs))  # type: ignore[arg-type]
    torch.testing.assert_close(strided, dense)
