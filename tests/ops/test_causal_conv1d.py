"""The convolution of the CPU against the reference and against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.triton_device import DEVICE, DTYPES, INTERPRETED, LENGTHS, error, on_triton
from widefield import ops
from widefield.errors import WidefieldError
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


BOUNDS = [0, 0, 2, 3, 63, 63, 64, 65, 126, 129, 150, 151]


def packed(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, weight and bias; the bounds of sequences of 0 to 61 tokens; a state for each."""
    x, weight, bias, _ = problem(1, BOUNDS[-1], 45, 4, dtype)
    state = torch.randn(len(BOUNDS) - 1, 45, 4).to(dtype)
    return [x, weight, bias], torch.tensor(BOUNDS), state


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_do_not_see_each_other(
    backend: Literal["cpu", "reference"], integer: torch.dtype, with_state: bool
) -> None:
    (x, weight, bias), bounds, states = packed()
    given = states if with_state else None
    with ops.use_backend(backend):
        y, last = ops.causal_conv1d(
            x, weight, bias, initial_state=given, cu_seqlens=bounds.to(integer)
        )
        for number, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
            before = states[number : number + 1] if with_state else None
            alone = (x[:, start:stop], weight, bias)
            if start == stop:
                expected = torch.zeros(1, 45, 4) if before is None else before
            else:
                part, expected = ops.causal_conv1d(*alone, initial_state=before)
                assert torch.equal(y[:, start:stop], part)
            assert torch.equal(last[number : number + 1], expected)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (torch.tensor([0.0, 9.0]), "cu_seqlens is torch.float32"),
        (torch.tensor([[0, 9]]), r"of shape \(1, 2\)"),
        (torch.tensor([0, 8]), "ascend from 0 to 9"),
        (torch.tensor([1, 9]), "ascend from 0 to 9"),
        (torch.tensor([0, 5, 3, 9]), "ascend from 0 to 9"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds: Tensor, said: str) -> None:
    x, weight, bias, _ = problem(1, 9, 20, 4)
    with pytest.raises(WidefieldError, match=said):
        ops.causal_conv1d(x, weight, bias, cu_seqlens=bounds)
    with pytest.raises(WidefieldError, match="with 2 rows: expected one row"):
        ops.causal_conv1d(*problem(2, 9, 20, 4)[:3], cu_seqlens=torch.tensor([0, 9]))


def derived(
    convolve: Callable[..., tuple[Tensor, Tensor]], to: Any, tensors: list[Tensor], **call: Any
) -> list[Tensor]:
    """Outputs, last inputs and the gradients of x, weight and bias."""
    leaves = [t.detach().to(**to).requires_grad_() for t in tensors]
    call = {n: t.to(**to) if t.is_floating_point() else t.to(to["device"]) for n, t in call.items()}
    y, last = convolve(*leaves, **call)
    signs = torch.arange(y.numel(), device=y.device).cos().view(y.shape)
    (y * signs).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    with torch.no_grad():
        plain, same = convolve(*leaves, **call)
    return [y, last, plain, same, *(g for g in gradients if g is not None)]


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_in_triton_are_as_exact_as_the_reference(
    dtype: torch.dtype, with_state: bool
) -> None:
    from widefield.ops.causal_conv1d import cuda

    tensors, bounds, state = packed(dtype)
    call: dict[str, Tensor] = {"cu_seqlens": bounds}
    if with_state:
        call["initial_state"] = state
    double = {"dtype": torch.float64, "device": DEVICE}
    own = {"dtype": dtype, "device": DEVICE}
    truth = derived(reference.causal_conv1d, double, tensors, **call)
    near = derived(reference.causal_conv1d, own, tensors, **call)
    ours = derived(cuda.causal_conv1d, own, tensors, **call)
    for value, same, exact in zip(ours, near, truth, strict=True):
        assert error(value, exact) <= 2 * error(same, exact) + 3e-7


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("taps", [2, 4])
def test_every_length_in_triton_is_as_exact_as_the_reference(
    dtype: torch.dtype, with_state: bool, taps: int
) -> None:
    from widefield.ops.causal_conv1d import cuda

    for length in (*LENGTHS, 3, 65):
        *tensors, state = problem(1, length, 45, taps, dtype)
        call = {"initial_state": state} if with_state else {}
        double = {"dtype": torch.float64, "device": DEVICE}
        own = {"dtype": dtype, "device": DEVICE}
        truth = derived(reference.causal_conv1d, double, tensors, **call)
        near = derived(reference.causal_conv1d, own, tensors, **call)
        ours = derived(cuda.causal_conv1d, own, tensors, **call)
        for value, same, exact in zip(ours, near, truth, strict=True):
            assert error(value, exact) <= 2 * error(same, exact) + 3e-7


@on_triton
def test_triton_fills_the_whole_of_its_output() -> None:
    from widefield.ops.causal_conv1d import cuda

    x, weight, bias, state = (t.to(DEVICE) for t in problem(2, 130, 70, 4))
    torch.use_deterministic_algorithms(True)  # torch then poisons new tensors with NaN
    try:
        with torch.no_grad():
            y, final = cuda.causal_conv1d(x, weight, bias, initial_state=state)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert final.isfinite().all()


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs much memory")
def test_triton_is_right_past_two_to_the_31_elements() -> None:
    from widefield.ops.causal_conv1d import cuda

    x = torch.randn(1, 1_048_577, 2560, device="cuda", dtype=torch.bfloat16)[..., :1536]
    weight, bias = torch.randn(1536, 4, device="cuda"), torch.randn(1536, device="cuda")
    with torch.no_grad():
        y, last = cuda.causal_conv1d(x, weight, bias)
        tail, same = cuda.causal_conv1d(x[:, -1000:].clone(), weight, bias)
    assert torch.equal(y[:, -900:], tail[:, -900:])
    assert torch.equal(last, same)
