"""RMS norms in Triton: every value is read once and written once. Forward only."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._triton import blocks, power_of_two

_NUMBERS = 4096  # that a program has in registers at least
_WIDEST = 1024  # of a piece of a row
_PIECES = 8


@triton.jit
def _forward(
    x_ptr, other_ptr, scale_ptr, w_ptr, sum_ptr, y_ptr, rows, length, groups, eps,
    x_batch, x_token, other_batch, other_token,
    ADD: tl.constexpr, SCALED: tl.constexpr,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A row is one group of one token, in pieces of whole blocks where its width allows it. The
    # other input is what is added or the gate.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = row // groups
    within = (row - token * groups) * WIDTH
    batch = token // length
    place = token - batch * length
    x_row = batch * x_batch + place * x_token + within
    other_row = batch * other_batch + place * other_token + within
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    values = ()
    gates = ()
    share = tl.full((ROWS, 1), 1.0, tl.float32)
    if SCALED:
        share = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    for piece in tl.static_range(PIECES):
        d = piece * BLOCK + column
        mask = (row < rows)[:, None] & (d < WIDTH)[None, :]
        x = tl.load(x_ptr + x_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if ADD or GATE:
            other = tl.load(other_ptr + other_row[:, None] + d[None, :], mask=mask, other=0.0)
            other = other.to(tl.float32)
            if ADD:
                if SCALED:
                    other *= share
                added = (x + other).to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + row[:, None] * WIDTH + d[None, :], added, mask=mask)
                x = added.to(tl.float32)
            else:
                other = other / (1.0 + tl.exp(-other))
                gates = gates + (other,)  # noqa: RUF005
                if GATE_FIRST:
                    x = x * other
        total += x * x
        values = values + (x,)  # noqa: RUF005
    scale = 1.0 / tl.sqrt_rn(tl.sum(total, axis=1) / WIDTH + eps)
    for piece in tl.static_range(PIECES):
        d = piece * BLOCK + column
        mask = (row < rows)[:, None] & (d < WIDTH)[None, :]
        y = values[piece] * scale[:, None]
        if WEIGHT:
            weight = tl.load(w_ptr + within[:, None] + d[None, :], mask=mask, other=0.0)
            y *= weight.to(tl.float32)
        if GATE:
            if not GATE_FIRST:
                y *= gates[piece]
        tl.store(y_ptr + row[:, None] * WIDTH + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _inverse(
    squares_ptr, scale_ptr, rows, width, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (part < PARTS)[None, :]
    squares = tl.load(squares_ptr + row[:, None] * PARTS + part[None, :], mask=mask, other=0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / width + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def inverse_rms(squares: Tensor, width: int, eps: float) -> Tensor:
    """What an RMS norm multiplies its input with; the same contract as the reference."""
    scale = torch.empty(squares.shape[:-1], dtype=torch.float32, device=squares.device)
    parts = squares.shape[-1]
    block = power_of_two(parts)
    many = _floor_to_power(_NUMBERS // block, 1, 64)
    with torch.cuda.device_of(squares):
        _inverse[(blocks(scale.numel(), many),)](
            squares.contiguous(), scale, scale.numel(), float(width), eps,
            PARTS=parts, BLOCK=block, ROWS=many, num_warps=4,
        )  # fmt: skip
    return scale


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, dtype: torch.dtype | None = None
) -> Tensor:
    """RMS norm: weight · x / √(mean(x²) + eps) on a GPU; the same contract as the reference."""
    if dtype is None:
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    return _Call(x, None, weight, eps).run(dtype)


def add_rms_norm(
    x: Tensor,
    other: Tensor,
    weight: Tensor,
    eps: float,
    *,
    scale: Tensor | None = None,
    sum_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum and its norm on a GPU; the same contract as the reference."""
    sum_dtype = sum_dtype or torch.promote_types(x.dtype, other.dtype)
    added = torch.empty(x.shape, dtype=sum_dtype, device=x.device)
    dtype = dtype or torch.promote_types(sum_dtype, weight.dtype)
    scale = None if scale is None else scale.contiguous()
    return added, _Call(x, other, weight, eps, added=added, scale=scale).run(dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    groups: int = 1,
    gate_first: bool = True,
) -> Tensor:
    """The gated norm on a GPU; the same contract as the reference."""
    call = _Call(x, gate, weight, eps, groups=groups, gate_first=gate_first)
    return call.run(torch.promote_types(x.dtype, weight.dtype))


@dataclass(frozen=True, slots=True)
class _Call:
    """The kernel's inputs; `other` is the gate, or what is added if there is room for the sum."""

    x: Tensor
    other: Tensor | None
    weight: Tensor | None
    eps: float
    added: Tensor | None = None
    scale: Tensor | None = None
    groups: int = 1
    gate_first: bool = False

    def run(self, dtype: torch.dtype) -> Tensor:
        """The normed values in `dtype`; the sum is left where there is room for it."""
        y = torch.empty(self.x.shape, dtype=dtype, device=self.x.device)
        if not y.numel():
            return y
        x = _by_token(self.x)
        # Absent inputs are passed as x: their flag keeps the kernel from reading them.
        other = x if self.other is None else _by_token(self.other)
        weight = x if self.weight is None else self.weight.contiguous()
        added = x if self.added is None else self.added
        scale = x if self.scale is None else self.scale
        rows = y.numel() // y.shape[-1] * self.groups
        width = y.shape[-1] // self.groups
        block, pieces, many, warps = _layout(width)
        with torch.cuda.device_of(x):
            _forward[(blocks(rows, many),)](
                x, other, scale, weight, added, y, rows, x.shape[1], self.groups, self.eps,
                x.stride(0), x.stride(1), other.stride(0), other.stride(1),
                ADD=self.added is not None, SCALED=self.scale is not None,
                WEIGHT=self.weight is not None, GATE=self.other is not None and self.added is None,
                GATE_FIRST=self.gate_first,
                WIDTH=width, PIECES=pieces, BLOCK=block, ROWS=many,
                num_warps=warps,
            )  # fmt: skip
        return y


@functools.cache
def _layout(width: int) -> tuple[int, int, int, int]:
    """Block and pieces of a row, rows and warps of a program."""
    block, pieces = _pieces(width)
    rows = _floor_to_power(_NUMBERS // (block * pieces), 1, _NUMBERS)
    return block, pieces, rows, _floor_to_power(block * pieces // 1024, 4, 16)


def _pieces(width: int) -> tuple[int, int]:
    """Blocks of a power of two that fill a row, and how many; one that is too wide if none do."""
    block = min(width & -width, _WIDEST)
    if width // block <= _PIECES:
        return block, width // block
    return power_of_two(width), 1


def _floor_to_power(number: int, least: int, most: int) -> int:
    """The largest that is no larger, between two others."""
    return min(most, max(least, 1 << max(0, number.bit_length() - 1)))


def _by_token(tensor: Tensor) -> Tensor:
    """(B, L, width) whose width is dense; a view where there is one."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    if tensor.ndim == 3:
        return tensor
    return tensor.reshape(1, -1, tensor.shape[-1])
