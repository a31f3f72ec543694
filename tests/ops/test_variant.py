"""Kept machine code of a Triton kernel runs only where Triton would have run the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.triton_device import DEVICE, DTYPES, on_triton

pytest.importorskip("triton")

import triton
import triton.language as tl

from widefield.ops._triton import Variant


@triton.jit
def _scaled(
    x_ptr, y_ptr, length, step, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * step, mask=at < length, other=0.0)
    tl.store(y_ptr + at, x * FACTOR, mask=at < length)


def variant(factor: float = 2.0) -> Variant:
    return Variant(_scaled, {"FACTOR": factor, "BLOCK": 64}, num_warps=1)


def run(kernel: Variant, x: Any, length: int, step: int) -> Any:
    y = torch.full((length,), torch.nan, dtype=x.dtype, device=x.device)
    kernel.launch((-(-length // 64), 1, 1), (x, y), (length, step))
    return y


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_number_and_place_is_right_the_first_time_and_later(
    dtype: torch.dtype,
) -> None:
    kernel = variant()
    x = torch.arange(4096, device=DEVICE).to(dtype)
    for _ in range(3):
        for length in (1, 15, 16, 64, 100, 160):
            for step in (1, 2, 16):
                for offset in (0, 1, 8):
                    part = x[offset:]
                    expected = 2 * part[: length * step : step]
                    assert torch.equal(run(kernel, part, length, step), expected)


@on_triton
def test_constants_belong_to_a_variant() -> None:
    x = torch.arange(64.0, device=DEVICE)
    assert torch.equal(run(variant(3.0), x, 64, 1), 3 * x)
    assert torch.equal(run(variant(0.5), x, 64, 1), 0.5 * x)


@on_triton
def test_no_more_launches_are_kept_than_a_few_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widefield.ops._triton._MOST", 3)
    kernel, x = variant(), torch.arange(256.0, device=DEVICE)
    for length in range(1, 20):
        assert torch.equal(run(kernel, x, length, 1), 2 * x[:length])
        assert len(kernel._known) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_launch_does_not_ask_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = variant(), torch.arange(256.0, device="cuda")
    run(kernel, x, 64, 1)
    monkeypatch.setattr(kernel, "_kernel", None)
    assert torch.equal(run(kernel, x, 64, 1), 2 * x[:64])
    with pytest.raises(TypeError):
        run(kernel, x[1:], 64, 1)  # not aligned: Triton is asked
