"""The convolution of the CPU against the reference and against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from widefield import ops
from widefield.ops.causal_conv1d import cpu, reference


def problem(
    batch: int, length: int, channels: int, taps: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs as a model makes them, a view; weight, bias, state."""
    x, _ = torch.randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    weight, bias = torch.randn(channels, taps).to(dtype), torch.randn(channels).to(dtype)
    return x, weight, bias, torch.randn(batch, channels, taps).to(dtype)


def assert_as_accurate_as_the_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None
) -> None:
    ours, ours_state = cpu.causal_conv1d(x, weight, bias, silu=silu, initial_state=state)
    theirs, theirs_state = reference.causal_conv1d(x, weight, bias, silu=silu, initial_state=state)
    exact, _ = reference.causal_conv1d(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        silu=silu,
        initial_state=None if state is None else state.double(),
    )
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours_state, theirs_state)
    few_roundings = 8 * exact.abs().max().item() * torch.finfo(x.dtype).eps / 2
    error, allowed = (ours - exact).abs().max().item(), (theirs - exact).abs().max().item()
    assert error <= max(2 * allowed, few_roundings)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.integers(1, 80),
    taps=st.integers(1, 6),
    with_bias=st.booleans(),
    silu=st.booleans(),
    with_state=st.booleans(),
)
def test_any_shape_bias_activation_and_state(
    batch: int,
    length: int,
    channels: int,
    taps: int,
    with_bias: bool,
    silu: bool,
    with_state: bool,
) -> None:
    x, weight, bias, state = problem(batch, length, channels, taps)
    assert_as_accurate_as_the_reference(
        x, weight, bias if with_bias else None, silu, state if with_state else None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_every_dtype_at_every_length(dtype: torch.dtype, length: int) -> None:
    x, weight, bias, state = problem(2, length, 40, 4, dtype)
    assert_as_accurate_as_the_reference(x, weight, bias, True, state)
    assert_as_accurate_as_the_reference(x, weight, bias, True, None)


def test_a_sequence_in_pieces_is_the_whole() -> None:
    x, weight, bias, state = problem(2, 600, 40, 4)
    y, final = cpu.causal_conv1d(x, weight, bias, initial_state=state)
    parts = []
    for start, stop in ((0, 1), (1, 3), (3, 300), (300, 301), (301, 600)):
        part, state = cpu.causal_conv1d(x[:, start:stop], weight, bias, initial_state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)


@pytest.mark.parametrize("length", [1, 530])
def test_fills_the_whole_of_its_output(length: int) -> None:
    x, weight, bias, state = problem(2, length, 70, 4)
    torch.use_deterministic_algorithms(True)  # torch then poisons new tensors with NaN
    try:
        y, final = cpu.causal_conv1d(x, weight, bias, initial_state=state)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert final.isfinite().all()


def test_a_nan_reaches_the_next_outputs_of_its_own_channel_only() -> None:
    x, weight, bias, _ = problem(1, 9, 20, 4)
    x[0, 2, 5] = torch.nan
    y, _ = cpu.causal_conv1d(x, weight, bias)
    touched = torch.zeros(9, 20, dtype=torch.bool)
    touched[2:6, 5] = True
    assert torch.equal(y[0].isnan(), touched)


def test_a_last_dimension_with_a_stride_is_read_right() -> None:
    x, weight, bias, state = problem(2, 30, 20, 4)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for piece, plain in ((turned, x), (turned[:, :1], x[:, :1])):
        y, _ = cpu.causal_conv1d(piece, weight, bias, initial_state=state)
        assert torch.equal(y, cpu.causal_conv1d(plain, weight, bias, initial_state=state)[0])


def test_dispatch_takes_the_cpu_kernel_unless_gradients_are_wanted() -> None:
    x, weight, bias, _ = problem(1, 9, 20, 4)
    y, _ = ops.causal_conv1d(x, weight, bias)
    assert torch.equal(y, cpu.causal_conv1d(x, weight, bias)[0])
    y, _ = ops.causal_conv1d(x, weight.requires_grad_(), bias)
    assert y.requires_grad
