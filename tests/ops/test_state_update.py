"""The decode step of the CPU against the reference and against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import DELTAS, scan_inputs, ssd_inputs
from widefield import ops
from widefield.ops.selective_scan import cpu as scan
from widefield.ops.ssd import cpu as ssd_scan
from widefield.ops.state_update import cpu, reference
from widefield.plan import ScanInputs, SSDInputs


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


def state_of(inputs: ScanInputs | SSDInputs) -> Tensor:
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


def ssd_arguments(inputs: SSDInputs, at: int = 0) -> tuple[Tensor | None, ...]:
    """One token of a scan's inputs as the arguments of a step of Mamba-2, without the state."""
    sequences = (inputs.x[:, at], inputs.delta[:, at], inputs.A, inputs.B[:, at], inputs.C[:, at])
    return *sequences, inputs.D, inputs.delta_bias


def assert_step_of_mamba_2_as_accurate_as_the_reference(inputs: SSDInputs) -> None:
    options = {"delta_softplus": inputs.delta_softplus, "delta_limit": inputs.delta_limit}
    token = ssd_arguments(inputs)
    wide = tuple(None if a is None else a.double() for a in token)
    ours, theirs, exact = state_of(inputs), state_of(inputs), state_of(inputs).double()
    y = cpu.ssd_state_update(ours, *token, **options)  # type: ignore[arg-type]
    y_theirs = reference.ssd_state_update(theirs, *token, **options)  # type: ignore[arg-type]
    y_exact = reference.ssd_state_update(exact, *wide, **options)  # type: ignore[arg-type]
    assert y.dtype == y_theirs.dtype
    for result, plain, truth in ((y, y_theirs, y_exact), (ours, theirs, exact)):
        few_roundings = 8 * truth.abs().max().item() * torch.finfo(result.dtype).eps / 2
        error, allowed = (result - truth).abs().max(), (plain - truth).abs().max().item()
        assert error <= max(2 * allowed, few_roundings)


@given(
    batch=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 140)),
    absent=st.sets(st.sampled_from(["D", "delta_bias"])),
    softplus=st.booleans(),
    limit=st.sampled_from([(0.0, math.inf), (0.02, math.inf), (0.0, 0.1), (0.02, 0.1)]),
    delta=st.sampled_from(DELTAS),
)
def test_mamba_2_in_any_shape_with_any_limit_and_any_absent_input(
    batch: int,
    shape: tuple[int, int, int, int],
    absent: set[str],
    softplus: bool,
    limit: tuple[float, float],
    delta: str,
) -> None:
    groups, share, width, size = shape
    inputs = ssd_inputs(batch, 1, groups * share, width, groups, size, delta=delta)
    inputs = inputs.replace(**dict.fromkeys(absent), delta_limit=limit)
    if not softplus:
        inputs = inputs.replace(delta=inputs.delta.sigmoid(), delta_softplus=False)
    assert_step_of_mamba_2_as_accurate_as_the_reference(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_of_mamba_2(dtype: torch.dtype) -> None:
    assert_step_of_mamba_2_as_accurate_as_the_reference(ssd_inputs(2, 1, dtype=dtype))


def test_a_negative_delta_of_mamba_2_has_no_limit_unless_one_is_given() -> None:
    inputs = ssd_inputs(1, 1, 2).replace(delta=torch.tensor([[[-0.5, 0.5]]]), delta_softplus=False)
    assert_step_of_mamba_2_as_accurate_as_the_reference(inputs)
    frozen = inputs.replace(delta_limit=(0.0, 0.0))
    state = state_of(frozen)
    cpu.ssd_state_update(
        state, *ssd_arguments(frozen), delta_softplus=False, delta_limit=(0.0, 0.0)
    )  # type: ignore[arg-type]
    assert torch.equal(state, state_of(frozen))


def test_steps_of_mamba_2_walk_the_same_way_as_the_scan() -> None:
    inputs = ssd_inputs(2, 200).replace(delta_limit=(0.02, 0.5))
    y, final = ssd_scan.ssd(inputs)
    state = state_of(inputs)
    for t in range(200):
        token = ssd_arguments(inputs, t)
        step = ops.ssd_state_update(state, *token, delta_limit=(0.02, 0.5))  # type: ignore[arg-type]
        torch.testing.assert_close(step, y[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_a_nan_delta_of_mamba_2_comes_out_as_nan_in_its_own_head_only() -> None:
    inputs = ssd_inputs(1, 1)
    inputs.delta[0, 0, 3] = torch.nan
    state = state_of(inputs)
    y = cpu.ssd_state_update(state, *ssd_arguments(inputs), delta_limit=(0.1, 1.0))  # type: ignore[arg-type]
    assert y[0].isnan().all(-1).tolist() == [False, False, False, True]
    assert not y[0, :3].isnan().any()
    assert state[0, 3].isnan().all()
    assert not state[0, :3].isnan().any()


def test_a_state_of_mamba_2_that_the_kernel_cannot_write_is_updated_all_the_same() -> None:
    inputs = ssd_inputs(2, 1)
    dense = state_of(inputs)
    strided = state_of(inputs).transpose(1, 2).contiguous().transpose(1, 2)
    for state in (dense, strided):
        cpu.ssd_state_update(state, *ssd_arguments(inputs))  # type: ignore[arg-type]
    torch.testing.assert_close(strided, dense)


def test_dispatch_of_mamba_2_takes_the_kernel_unless_gradients_are_wanted() -> None:
    inputs = ssd_inputs(2, 1)
    x, *rest = ssd_arguments(inputs)
    assert x is not None
    y = ops.ssd_state_update(state_of(inputs), x, *rest)  # type: ignore[arg-type]
    kernel, plain = state_of(inputs), state_of(inputs)
    assert torch.equal(y, cpu.ssd_state_update(kernel, x, *rest))  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_()
    grown = ops.ssd_state_update(state_of(inputs), leaf, *rest)  # type: ignore[arg-type]
    assert grown.requires_grad
    assert torch.equal(grown, reference.ssd_state_update(plain, x, *rest))  # type: ignore[arg-type]
