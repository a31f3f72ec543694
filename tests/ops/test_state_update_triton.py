"""The decode step's Triton kernels against float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import DELTAS, scan_inputs, ssd_inputs
from tests.ops.test_state_update import arguments, ssd_arguments, state_of
from tests.ops.triton_device import DEVICE, INTERPRETED, error, on_triton
from tests.ops.triton_device import DTYPES as ALL_DTYPES
from widefield.ops.state_update import reference

# Of the narrow ones, the interpreter rounds to float16 only.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [*ALL_DTYPES]
HEADS = [(4, 20, 2, 18), (1, 1, 1, 1), (2, 9, 1, 128) if INTERPRETED else (24, 64, 1, 128)]


def assert_as_exact_as(
    name: str, state: Tensor, tokens: Sequence[Tensor | None], **options: Any
) -> None:
    """The kernel and the reference against the reference in float64, y and state."""
    from widefield.ops.state_update import cuda

    def run(step: Callable[..., Tensor], dtype: torch.dtype | None, device: str) -> list[Tensor]:
        moved = [None if t is None else t.to(device, dtype or t.dtype) for t in tokens]
        after = state.clone().to(device, dtype or state.dtype)
        return [step(after, *moved, **options), after]

    plain, kernel = getattr(reference, name), getattr(cuda, name)
    truth = run(plain, torch.float64, "cpu")
    near = run(plain, None, DEVICE)
    ours = run(kernel, None, DEVICE)
    for value, same, exact in zip(ours, near, truth, strict=True):
        assert value.dtype == same.dtype
        assert error(value, exact) <= 2 * error(same, exact) + 3e-7


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 32, 70])
@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_the_convolution_takes_one_step(
    dtype: torch.dtype, channels: int, kernel: int, silu: bool
) -> None:
    wide = torch.randn(3, 2 * channels).to(dtype)
    weight, bias = torch.randn(channels, kernel).to(dtype), torch.randn(channels).to(dtype)
    state = torch.randn(3, channels, kernel).to(dtype)
    for b in (None, bias):
        tokens = (wide[:, :channels], weight, b)
        assert_as_exact_as("causal_conv1d_update", state, tokens, silu=silu)


@on_triton
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(("channels", "size"), [(1, 1), (40, 16), (70, 9), (33, 128)])
def test_the_selective_scan_takes_one_step(delta: str, channels: int, size: int) -> None:
    inputs = scan_inputs(2, 1, channels, size, delta=delta)
    assert_as_exact_as("selective_state_update", state_of(inputs), arguments(inputs))


@on_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("absent", [[], ["z"], ["D", "delta_bias"]], ids=str)
def test_narrow_and_absent_inputs_of_the_scan(dtype: torch.dtype, absent: list[str]) -> None:
    inputs = scan_inputs(2, 1, 40, dtype=dtype).replace(**dict.fromkeys(absent))
    assert_as_exact_as("selective_state_update", state_of(inputs), arguments(inputs))


@on_triton
def test_groups_of_channels_have_their_own_B_and_C() -> None:
    inputs = scan_inputs(2, 1, 42, 16)
    x, delta, A, _, _, *rest = arguments(inputs)
    B, C = torch.randn(2, 2, 3, 16)
    tokens = (x, delta, A, B, C, *rest)
    assert_as_exact_as("selective_state_update", state_of(inputs), tokens)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "size", "rank"), [(1, 1, 1), (40, 16, 5), (70, 9, 48)])
def test_the_scan_takes_one_step_from_the_low_rank_of_its_delta(
    dtype: torch.dtype, channels: int, size: int, rank: int
) -> None:
    inputs = scan_inputs(2, 1, channels, size, dtype=dtype)
    x, _, A, B, C, *rest = arguments(inputs)
    assert A is not None
    low, weight = torch.randn(2, rank + 3)[:, 3:], torch.randn(channels, rank) / rank
    tokens = (x, low.to(dtype), weight.to(dtype), torch.log(-A).to(dtype), B, C, *rest)
    assert_as_exact_as("low_rank_state_update", state_of(inputs), tokens)


@on_triton
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.02, 0.1)], ids=str)
def test_the_scan_of_mamba_2_takes_one_step(
    delta: str, shape: tuple[int, int, int, int], limit: tuple[float, float]
) -> None:
    inputs = ssd_inputs(2, 1, *shape, delta=delta)
    tokens = ssd_arguments(inputs)
    assert_as_exact_as("ssd_state_update", state_of(inputs), tokens, delta_limit=limit)


@on_triton
def test_rates_of_mamba_2_may_come_as_logarithms() -> None:
    inputs = ssd_inputs(2, 1)
    x, delta, A, *rest = ssd_arguments(inputs)
    assert A is not None
    tokens = (x, delta, torch.log(-A), *rest)
    assert_as_exact_as("ssd_state_update", state_of(inputs), tokens, log_rates=True)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("absent", [[], ["D"], ["D", "delta_bias"]], ids=str)
def test_narrow_and_absent_inputs_of_mamba_2(dtype: torch.dtype, absent: list[str]) -> None:
    inputs = ssd_inputs(2, 1, dtype=dtype).replace(**dict.fromkeys(absent))
    assert_as_exact_as("ssd_state_update", state_of(inputs), ssd_arguments(inputs))


@on_triton
def test_a_state_that_the_kernels_cannot_write_is_updated_all_the_same() -> None:
    inputs = scan_inputs(2, 1, 20)
    strided = state_of(inputs).transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_exact_as("selective_state_update", strided, arguments(inputs))


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs 9 GiB")
def test_states_past_two_thousand_million_elements() -> None:
    """The last row of a state with more than 2^31 elements comes out as it does alone."""
    from widefield.ops.state_update import cuda

    inputs = scan_inputs(1, 1, 4096, 16)
    rows = (1 << 31) // (4096 * 16) + 2
    tokens = [None if t is None else t.cuda() for t in arguments(inputs)]
    many = [
        t if t is None or index in (2, 5, 7) else t.expand(rows, *t.shape[1:])
        for index, t in enumerate(tokens)
    ]
    alone = state_of(inputs).cuda()
    state = alone.expand(rows, -1, -1).contiguous()
    y = cuda.selective_state_update(state, *many)  # type: ignore[arg-type]
    assert torch.equal(y[-1:], cuda.selective_state_update(alone, *tokens))  # type: ignore[arg-type]
    assert torch.equal(state[-1:], alone)
