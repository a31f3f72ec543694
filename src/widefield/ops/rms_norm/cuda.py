"""RMS norms in Triton: every value is read once and written once. Forward only."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._backend import on_device_of
from widefield.ops._triton import Variant, power_of_two

_NUMBERS = 4096  # that a program has in registers at least
_WIDEST = 1024  # of a piece of a row
_PIECES = 8


@triton.jit
def _forward(
    x_ptr, other_ptr, w_ptr, sum_ptr, y_ptr, rows, length, groups,
    x_batch, x_token, other_batch, other_token,
    EPS: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
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
    for piece in tl.static_range(PIECES):
        d = piece * BLOCK + column
        mask = (row < rows)[:, None] & (d < WIDTH)[None, :]
        x = tl.load(x_ptr + x_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if ADD or GATE:
            other = tl.load(other_ptr + other_row[:, None] + d[None, :], mask=mask, other=0.0)
            other = other.to(tl.float32)
            if ADD:
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
    scale = 1.0 / tl.sqrt_rn(tl.sum(total, axis=1) / WIDTH + EPS)
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
    sum_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum and its norm on a GPU; the same contract as the reference."""
    sum_dtype = sum_dtype or torch.promote_types(x.dtype, other.dtype)
    added = torch.empty_like(x, dtype=sum_dtype, memory_format=torch.contiguous_format)
    dtype = dtype or torch.promote_types(sum_dtype, weight.dtype)
    return added, _Call(x, other, weight, eps, added=added).run(dtype)


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


@dataclass(slots=True)
class _Call:
    """The kernel's inputs; `other` is the gate, or what is added if there is room for the sum."""

    x: Tensor
    other: Tensor | None
    weight: Tensor | None
    eps: float
    added: Tensor | None = None
    groups: int = 1
    gate_first: bool = False

    def run(self, dtype: torch.dtype) -> Tensor:
        """The normed values in `dtype`; the sum is left where there is room for it."""
        given = self.x
        y = torch.empty_like(given, dtype=dtype, memory_format=torch.contiguous_format)
        if not y.numel():
            return y
        x = _by_token(given)
        # Absent inputs are passed as x: their flag keeps the kernel from reading them.
        other = x if self.other is None else _by_token(self.other)
        weight = x if self.weight is None else self.weight.contiguous()
        batch, length, features = x.shape
        gated = self.other is not None and self.added is None
        variant, many = _variant(
            features // self.groups, self.eps, self.added is not None, self.weight is not None,
            gated, self.gate_first,
        )  # fmt: skip
        rows = batch * length * self.groups
        strides, others = x.stride(), other.stride()
        numbers = (rows, length, self.groups, strides[0], strides[1], others[0], others[1])
        tensors = (x, other, weight, x if self.added is None else self.added, y)
        with on_device_of(y):
            variant.launch((-(-rows // many), 1, 1), tensors, numbers)
        return y


@functools.lru_cache(maxsize=256)
def _variant(
    width: int, eps: float, add: bool, weight: bool, gate: bool, gate_first: bool
) -> tuple[Variant, int]:
    """The kernel for one kind of call, and the rows that a program of it takes."""
    block, pieces, rows, warps = _layout(width)
    constants = {
        "EPS": eps, "ADD": add, "WEIGHT": weight, "GATE": gate, "GATE_FIRST": gate_first,
        "WIDTH": width, "PIECES": pieces, "BLOCK": block, "ROWS": rows,
    }  # fmt: skip
    return Variant(_forward, constants, num_warps=warps), rows


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
