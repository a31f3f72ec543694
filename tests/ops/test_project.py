"""The fused projection of one token a row against float64: plain torch, and its Triton kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.triton_device import DEVICE, INTERPRETED, error, on_triton
from tests.ops.triton_device import DTYPES as ALL_DTYPES
from widefield.ops.project import Convolution, reference

# Of the narrow ones, the interpreter rounds to float16 only.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [*ALL_DTYPES]
SHAPES = [(1, 7, 5), (3, 9, 70)]
if not INTERPRETED:
    SHAPES += [(1, 3352, 768), (3, 768, 1536), (2, 80, 5120), (16, 40, 70)]
PARTS = ("bias", "gate", "norm", "conv", "residual")


def case(
    batch: int, outputs: int, features: int, parts: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Any]:
    wide = torch.randn(batch, 2 * features).to(dtype)
    found: dict[str, Any] = {"x": wide[:, :features]}
    found["weight"] = (torch.randn(outputs, features) / features**0.5).to(dtype)
    if "bias" in parts:
        found["bias"] = torch.randn(outputs).to(dtype)
    if "gate" in parts:
        found["gate"] = wide[:, features:]
    if "norm" in parts:
        found |= {"norm": torch.randn(features).to(dtype), "eps": 1e-5}
    if "residual" in parts:
        found["residual"] = torch.randn(batch, outputs)
        found["dtype"] = torch.float32
    if "conv" in parts:
        channels = max(1, outputs - 3)
        state = torch.randn(batch, channels, 4).to(dtype)
        taps, shift = torch.randn(channels, 4).to(dtype), torch.randn(channels).to(dtype)
        found["convolution"] = Convolution(state, taps, shift, outputs - channels)
    return found


def run(project: Any, arguments: dict[str, Any], dtype: torch.dtype | None, device: str) -> Any:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype or value.dtype, copy=True)
        if isinstance(value, Convolution):
            tensors = (moved(t) for t in (value.state, value.weight, value.bias))
            return Convolution(*tensors, value.first)
        return value

    given = {name: moved(value) for name, value in arguments.items()}
    if dtype is not None:
        given["dtype"] = dtype
    y = project(given.pop("x"), given.pop("weight"), given.pop("bias", None), **given)
    convolution = given.get("convolution")
    return [y] if convolution is None else [y, convolution.state]


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "parts", [(), ("bias", "norm"), ("norm", "conv"), ("gate", "norm", "residual"), PARTS], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_as_exact_as_the_reference(
    shape: tuple[int, int, int], parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    from widefield.ops.project import cuda

    arguments = case(*shape, parts, dtype)
    truth = run(reference.project, arguments, torch.float64, "cpu")
    near = run(reference.project, arguments, None, DEVICE)
    ours = run(cuda.project, arguments, None, DEVICE)
    for value, same, exact in zip(ours, near, truth, strict=True):
        assert value.dtype == same.dtype
        assert error(value, exact) <= 2 * error(same, exact) + 3e-7


@on_triton
def test_a_state_that_is_not_dense_goes_on_all_the_same() -> None:
    from widefield.ops.project import cuda

    given = case(3, 9, 20, ("norm", "conv"), torch.float32)
    dense = given["convolution"]
    strided = dense.state.transpose(1, 2).contiguous().transpose(1, 2)
    y, state = run(cuda.project, given, None, DEVICE)
    tensors = [t.to(DEVICE) for t in (given["x"], given["weight"], given["norm"])]
    moved = Convolution(
        strided.to(DEVICE), dense.weight.to(DEVICE), dense.bias.to(DEVICE), dense.first
    )
    ours = cuda.project(*tensors[:2], norm=tensors[2], eps=given["eps"], convolution=moved)
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(moved.state, state)


def test_the_parts_are_those_of_a_block() -> None:
    given = case(3, 40, 24, PARTS, torch.float32)
    convolution = given["convolution"]
    before = convolution.state.clone()
    gated = given["x"] * F.silu(given["gate"])
    normed = F.rms_norm(gated, (24,), given["norm"], 1e-5)
    y = F.linear(normed, given["weight"], given["bias"])
    new = torch.cat([before[:, :, 1:], y[:, 3:, None]], -1)
    y[:, 3:] = F.silu((new * convolution.weight).sum(-1) + convolution.bias)
    ours, state = run(reference.project, given, None, "cpu")
    torch.testing.assert_close(ours, y + given["residual"])
    torch.testing.assert_close(state, new)
    assert torch.equal(convolution.state, before)
