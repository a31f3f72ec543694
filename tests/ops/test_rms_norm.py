"""The RMS norms: what the reference means, and Triton's kernels against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.triton_device import DEVICE, DTYPES, INTERPRETED, LENGTHS, error, on_triton
from widefield import ops
from widefield.ops.rms_norm import reference

GATED = [(groups, first) for groups in (1, 3) for first in (True, False)]


def inputs(length: int, width: int = 90, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x and gate, views of one product; the weight."""
    x, gate = torch.randn(2, length, 2 * width).to(dtype).chunk(2, dim=-1)
    return [x, gate, torch.rand(width).to(dtype)]


def moved(tensors: list[Tensor], *to: Any) -> list[Tensor]:
    return [t.to(*to) for t in tensors]


def test_the_plain_norm_is_that_of_torch() -> None:
    x, _, weight = inputs(20)
    expected = nn.functional.rms_norm(x, (90,), weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)
    torch.testing.assert_close(ops.rms_norm(x, None, 1e-5) * weight, expected)


def test_the_gate_stands_before_or_behind_the_norm() -> None:
    x, gate, weight = inputs(20)
    before = ops.gated_rms_norm(x, gate, weight, 1e-5)
    torch.testing.assert_close(before, ops.rms_norm(x * nn.functional.silu(gate), weight, 1e-5))
    behind = ops.gated_rms_norm(x, gate, weight, 1e-5, gate_first=False)
    torch.testing.assert_close(behind, ops.rms_norm(x, weight, 1e-5) * nn.functional.silu(gate))


def test_groups_are_normed_apart() -> None:
    x, gate, weight = inputs(20)
    whole = ops.gated_rms_norm(x, gate, weight, 1e-5, groups=3)
    for part in (slice(0, 30), slice(30, 60), slice(60, 90)):
        alone = ops.gated_rms_norm(x[..., part], gate[..., part], weight[part], 1e-5)
        torch.testing.assert_close(whole[..., part], alone)


def test_the_output_is_as_wide_as_asked() -> None:
    x, _, weight = inputs(5, dtype=torch.bfloat16)
    assert ops.rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert ops.rms_norm(x, weight.float(), 1e-5).dtype == torch.float32
    assert ops.rms_norm(x, weight.float(), 1e-5, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gradients_reach_input_gate_and_weight() -> None:
    leaves = [t.detach().requires_grad_() for t in inputs(4)]
    ops.gated_rms_norm(*leaves, 1e-5).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in leaves)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_kernel_is_as_exact_as_the_reference(length: int, dtype: torch.dtype) -> None:
    from widefield.ops.rms_norm import cuda

    x, _gate, weight = moved(inputs(length, dtype=dtype), DEVICE)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5)
    allowed = 2 * error(reference.rms_norm(x, weight, 1e-5), truth)
    assert error(cuda.rms_norm(x, weight, 1e-5), truth) <= allowed
    bare = reference.rms_norm(x.double(), None, 1e-5)
    allowed = 2 * error(reference.rms_norm(x, None, 1e-5), bare)
    assert error(cuda.rms_norm(x, None, 1e-5), bare) <= allowed


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "gate_first"), GATED)
def test_the_gated_kernel_is_as_exact_as_the_reference(
    groups: int, gate_first: bool, dtype: torch.dtype
) -> None:
    from widefield.ops.rms_norm import cuda

    call = {"groups": groups, "gate_first": gate_first}
    tensors = moved(inputs(63, dtype=dtype), DEVICE)
    truth = reference.gated_rms_norm(*moved(tensors, torch.float64), 1e-5, **call)
    allowed = 2 * error(reference.gated_rms_norm(*tensors, 1e-5, **call), truth)
    assert error(cuda.gated_rms_norm(*tensors, 1e-5, **call), truth) <= allowed


@on_triton
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 4, 64), (0, 64), (64,)])
def test_the_kernel_takes_any_shape(shape: tuple[int, ...]) -> None:
    from widefield.ops.rms_norm import cuda

    x, weight = moved([torch.randn(*shape, dtype=torch.float32), torch.rand(64)], DEVICE)
    torch.testing.assert_close(cuda.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    turned = torch.randn(64, 7, device=DEVICE).t()
    expected = reference.rms_norm(turned, weight, 1e-5)
    torch.testing.assert_close(cuda.rms_norm(turned, weight, 1e-5), expected)


@on_triton
def test_a_wide_residual_is_normed_without_a_copy_of_it() -> None:
    from widefield.ops.rms_norm import cuda

    x, _gate, weight = moved(inputs(63), DEVICE)
    y = cuda.rms_norm(x, weight.half(), 1e-5, dtype=torch.float16)
    assert y.dtype == torch.float16
    assert error(y, reference.rms_norm(x.double(), weight.half().double(), 1e-5)) < 5e-4


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs much memory")
def test_the_kernel_is_right_past_two_to_the_31_elements() -> None:
    from widefield.ops.rms_norm import cuda

    x = torch.randn(1, 700_000, 3200, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(1600, device="cuda").bfloat16()
    whole = cuda.gated_rms_norm(x[..., :1600], x[..., 1600:], weight, 1e-5)
    part = x[:, -1000:].clone()
    alone = cuda.gated_rms_norm(part[..., :1600], part[..., 1600:], weight, 1e-5)
    assert torch.equal(whole[:, -1000:], alone)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [90, 96, 2560, 5120])
def test_a_sum_and_its_norm_are_as_exact_as_the_reference(
    dtype: torch.dtype, residual: torch.dtype, width: int
) -> None:
    from widefield.ops.rms_norm import cuda

    x, other, weight = moved(inputs(63, width, dtype), DEVICE)
    x = x.to(residual)
    truth = reference.add_rms_norm(*moved([x, other, weight], torch.float64), 1e-5)
    call = {"sum_dtype": torch.float32, "dtype": dtype}
    same = reference.add_rms_norm(x, other, weight, 1e-5, **call)
    ours = cuda.add_rms_norm(x, other, weight, 1e-5, **call)
    for value, near, exact in zip(ours, same, truth, strict=True):
        assert value.dtype == near.dtype
        assert error(value, exact) <= 2 * error(near, exact)


def gradients(norm: Any, tensors: list[Tensor], **call: Any) -> list[Tensor]:
    """Of the inputs, for fixed random gradients of the outputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = norm(*leaves, 1e-5, **call)
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        weights = torch.randn(output.shape, generator=generator).to(tensors[0].dtype)
        loss = loss + (output * weights.to(output.device, output.dtype)).double().sum()
    loss.backward()
    return [t.grad for t in leaves if t.grad is not None]


def assert_gradients_as_exact(name: str, tensors: list[Tensor], **call: Any) -> None:
    from widefield.ops.rms_norm import cuda

    wide = {k: v for k, v in call.items() if "dtype" not in k}
    exact = gradients(getattr(reference, name), moved(tensors, torch.float64), **wide)
    same = gradients(getattr(reference, name), tensors, **call)
    ours = gradients(getattr(cuda, name), tensors, **call)
    assert len(ours) == len(tensors)
    for value, near, truth in zip(ours, same, exact, strict=True):
        assert value.dtype == near.dtype
        assert error(value, truth) <= 2 * error(near, truth)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_of_the_plain_norm_are_as_exact_as_the_references(
    length: int, dtype: torch.dtype
) -> None:
    x, _gate, weight = moved(inputs(length, dtype=dtype), DEVICE)
    assert_gradients_as_exact("rms_norm", [x, weight])


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "gate_first"), GATED)
@pytest.mark.parametrize("width", [90, 96] if INTERPRETED else [90, 1536, 4608])
def test_gradients_of_the_gated_norm_are_as_exact_as_the_references(
    groups: int, gate_first: bool, width: int, dtype: torch.dtype
) -> None:
    tensors = moved(inputs(63, width, dtype), DEVICE)
    assert_gradients_as_exact("gated_rms_norm", tensors, groups=groups, gate_first=gate_first)


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [90, 96] if INTERPRETED else [90, 768])
def test_gradients_of_a_sum_and_its_norm_are_as_exact_as_the_references(
    width: int, dtype: torch.dtype
) -> None:
    x, other, weight = moved(inputs(63, width, dtype), DEVICE)
    call = {"sum_dtype": torch.float32, "dtype": dtype}
    assert_gradients_as_exact("add_rms_norm", [x.float(), other, weight], **call)


@on_triton
def test_gradients_fill_the_whole_of_what_they_return() -> None:
    tensors = moved(inputs(63), DEVICE)
    torch.use_deterministic_algorithms(True)  # torch then poisons new tensors with NaN
    try:
        from widefield.ops.rms_norm import cuda

        found = gradients(cuda.gated_rms_norm, tensors, groups=3)
        bare = gradients(lambda x, eps: cuda.rms_norm(x, None, eps), tensors[:1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in [*found, *bare])


@on_triton
def test_nothing_to_norm_has_gradients_of_nothing() -> None:
    from widefield.ops.rms_norm import cuda

    x, weight = torch.zeros(0, 64, device=DEVICE), torch.rand(64, device=DEVICE)
    dx, dweight = gradients(cuda.rms_norm, [x, weight])
    assert dx.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros_like(weight))


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_that_is_multiplied_later_is_as_exact_as_the_reference(dtype: torch.dtype) -> None:
    from widefield.ops.rms_norm import cuda

    x, other, weight = moved(inputs(63, 96, dtype), DEVICE)
    squares = torch.rand(2, 63, 5, device=DEVICE)
    exact = reference.inverse_rms(squares.double(), 96, 1e-5)
    scale = cuda.inverse_rms(squares, 96, 1e-5)
    assert error(scale, exact) <= 2 * error(reference.inverse_rms(squares, 96, 1e-5), exact)
    wide = moved([x, other, weight], torch.float64)
    truth = reference.add_rms_norm(*wide, 1e-5, scale=exact)
    call = {"scale": scale, "sum_dtype": torch.float32, "dtype": dtype}
    same = reference.add_rms_norm(x, other, weight, 1e-5, **call)
    ours = cuda.add_rms_norm(x, other, weight, 1e-5, **call)
    for value, near, exactly in zip(ours, same, truth, strict=True):
        assert value.dtype == near.dtype
        assert error(value, exactly) <= 2 * error(near, exactly)
