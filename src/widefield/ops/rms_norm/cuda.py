"""RMS norms in Triton: every value is read once and written once, forward and backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._backend import on_device_of
from widefield.ops._triton import Variant, blocks, power_of_two

_NUMBERS = 4096  # that a program has in registers at least
_NUMBERS_BACKWARD = 2048
_WIDEST = 1024  # of a piece of a row
_PIECES = 8


@triton.jit
def _forward(
    x_ptr, other_ptr, scale_ptr, w_ptr, sum_ptr, y_ptr, rows, length, groups,
    x_batch, x_token, other_batch, other_token,
    EPS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, WEIGHT: tl.constexpr,
    GATE: tl.constexpr, GATE_FIRST: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
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


@triton.jit
def _backward(
    x_ptr, gate_ptr, w_ptr, dy_ptr, dsum_ptr, dx_ptr, dgate_ptr, dw_ptr,
    tokens, length, eps, x_batch, x_token, gate_batch, gate_token,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A program takes every so manyth row of one group, and keeps their sums for the weight.
    column = tl.arange(0, BLOCK)
    within = tl.program_id(1) * WIDTH
    full = tl.num_programs(1) * WIDTH
    dweights = ()
    for _ in tl.static_range(PIECES):
        dweights = dweights + (tl.zeros((ROWS, BLOCK), tl.float32),)  # noqa: RUF005
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        token = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        batch = token // length
        place = token - batch * length
        x_row = batch * x_batch + place * x_token + within
        gate_row = batch * gate_batch + place * gate_token + within
        y_row = token * full + within
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        shared = tl.zeros((ROWS, BLOCK), tl.float32)
        xs = ()
        dys = ()
        gates = ()
        for piece in tl.static_range(PIECES):
            d = piece * BLOCK + column
            mask = (token < tokens)[:, None] & (d < WIDTH)[None, :]
            x = tl.load(x_ptr + x_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + y_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            value = x
            grown = dy
            if GATE:
                gate = tl.load(gate_ptr + gate_row[:, None] + d[None, :], mask=mask, other=0.0)
                gate = gate.to(tl.float32)
                gates = gates + (gate,)  # noqa: RUF005
                gate = gate / (1.0 + tl.exp(-gate))
                if GATE_FIRST:
                    value *= gate
                else:
                    grown *= gate
            if WEIGHT:
                weight = tl.load(w_ptr + within + d, mask=d < WIDTH, other=0.0).to(tl.float32)
                grown *= weight[None, :]
            squares += value * value
            shared += grown * value
            xs = xs + (x,)  # noqa: RUF005
            dys = dys + (dy,)  # noqa: RUF005
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / WIDTH + eps)
        pull = (tl.sum(shared, axis=1) / WIDTH * scale * scale)[:, None]
        scale = scale[:, None]
        sums = ()
        for piece in tl.static_range(PIECES):
            d = piece * BLOCK + column
            mask = (token < tokens)[:, None] & (d < WIDTH)[None, :]
            value = xs[piece]
            grown = dys[piece]
            if WEIGHT:
                weight = tl.load(w_ptr + within + d, mask=d < WIDTH, other=0.0).to(tl.float32)
                grown *= weight[None, :]
            if GATE:
                gate = gates[piece]
                open = tl.sigmoid(gate)
                slope = open * (1.0 + gate * (1.0 - open))
                gate *= open
                if GATE_FIRST:
                    value *= gate
                    dx = scale * (grown - value * pull)
                    dgate = dx * xs[piece] * slope
                    dx *= gate
                    sums = sums + (dweights[piece] + dys[piece] * (value * scale),)  # noqa: RUF005
                else:
                    dgate = grown * (value * scale) * slope
                    dx = scale * (grown * gate - value * pull)
                    sums = sums + (  # noqa: RUF005
                        dweights[piece] + dys[piece] * gate * (value * scale),
                    )
                tl.store(
                    dgate_ptr + y_row[:, None] + d[None, :],
                    dgate.to(dgate_ptr.dtype.element_ty), mask=mask,
                )  # fmt: skip
            else:
                dx = scale * (grown - value * pull)
                sums = sums + (dweights[piece] + dys[piece] * (value * scale),)  # noqa: RUF005
                if ADD:
                    dsum = tl.load(dsum_ptr + y_row[:, None] + d[None, :], mask=mask, other=0.0)
                    dx += dsum.to(tl.float32)
            tl.store(
                dx_ptr + y_row[:, None] + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask
            )
        dweights = sums
    if WEIGHT:
        spot = tl.program_id(0).to(tl.int64) * full + within
        for piece in tl.static_range(PIECES):
            d = piece * BLOCK + column
            total = tl.sum(tl.cast(dweights[piece], tl.float64), axis=0)
            tl.store(dw_ptr + spot + d, total.to(tl.float32), mask=d < WIDTH)


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
    with on_device_of(squares):
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
    return _differentiable(_Call(x, None, weight, eps), dtype)[0]


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
    dtype = dtype or torch.promote_types(sum_dtype, weight.dtype)
    scale = None if scale is None else scale.contiguous()
    call = _Call(x, other, weight, eps, sum_dtype=sum_dtype, scale=scale)
    y, added = _differentiable(call, dtype)
    assert added is not None
    return added, y


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
    return _differentiable(call, torch.promote_types(x.dtype, weight.dtype))[0]


@dataclass(slots=True)
class _Call:
    """The kernel's inputs; `other` is the gate, or what is added if the sum has a dtype."""

    x: Tensor
    other: Tensor | None
    weight: Tensor | None
    eps: float
    sum_dtype: torch.dtype | None = None
    scale: Tensor | None = None
    groups: int = 1
    gate_first: bool = False

    def run(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The normed values in `dtype`, and the sum."""
        y, added = torch.empty(self.x.shape, dtype=dtype, device=self.x.device), None
        if self.sum_dtype is not None:
            added = torch.empty_like(y, dtype=self.sum_dtype)
        if not y.numel():
            return y, added
        x = _by_token(self.x)
        # Absent inputs are passed as x: their flag keeps the kernel from reading them.
        other = x if self.other is None else _by_token(self.other)
        scale = x if self.scale is None else self.scale
        weight = x if self.weight is None else self.weight.contiguous()
        batch, length, features = x.shape
        variant, many = _variant(
            features // self.groups, self.eps, added is not None, self.scale is not None,
            self.weight is not None, self.gate is not None, self.gate_first,
        )  # fmt: skip
        rows = batch * length * self.groups
        strides, others = x.stride(), other.stride()
        numbers = (rows, length, self.groups, strides[0], strides[1], others[0], others[1])
        with on_device_of(y):
            tensors = (x, other, scale, weight, x if added is None else added, y)
            variant.launch((blocks(rows, many), 1, 1), tensors, numbers)
        return y, added

    @property
    def gate(self) -> Tensor | None:
        return None if self.sum_dtype is not None else self.other

    def gradients(
        self, dy: Tensor, dsum: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of x (or of the sum, given as x), of the gate and of the weight."""
        dx = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        gate = self.gate
        dgate = None if gate is None else torch.empty_like(dx, dtype=gate.dtype)
        if not dx.numel():
            return dx, dgate, None if self.weight is None else torch.zeros_like(self.weight)
        x = _by_token(self.x)
        gate = x if gate is None else _by_token(gate)
        weight = x if self.weight is None else self.weight.contiguous()
        width = dx.shape[-1] // self.groups
        tokens = dx.numel() // dx.shape[-1]
        block, pieces, many, warps = _layout(width, _NUMBERS_BACKWARD)
        workers = min(blocks(tokens, many), blocks(4 * _processors(x.device), self.groups))
        shape = (workers, dx.shape[-1])
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        with on_device_of(x):
            _backward[(workers, self.groups)](
                x, gate, weight, dy.contiguous(), dx if dsum is None else dsum.contiguous(),
                dx, dx if dgate is None else dgate, partial, tokens, x.shape[1], self.eps,
                x.stride(0), x.stride(1), gate.stride(0), gate.stride(1),
                ADD=dsum is not None, WEIGHT=self.weight is not None, GATE=dgate is not None,
                GATE_FIRST=self.gate_first, WIDTH=width, PIECES=pieces, BLOCK=block, ROWS=many,
                num_warps=warps,
            )  # fmt: skip
        return dx, dgate, None if self.weight is None else partial.sum(0).to(self.weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, weight: Tensor | None, call: _Call,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        call = replace(call, x=x, other=other, weight=weight)
        y, added = call.run(dtype)
        ctx.set_materialize_grads(False)
        ctx.call = replace(call, x=None, other=None, weight=None)
        ctx.dtypes = (x.dtype, None if other is None else other.dtype)
        ctx.save_for_backward(x if added is None else added, call.gate, weight)
        return y, added

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dsum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        call = replace(ctx.call, x=x, other=gate, weight=weight)
        dx, dother, dweight = call.gradients(dy, dsum)
        if call.sum_dtype is not None:
            dother = dx.to(ctx.dtypes[1])
        return dx.to(ctx.dtypes[0]), dother, dweight, None, None


def _differentiable(call: _Call, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    leaves = (call.x, call.other, call.weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return _Norm.apply(*leaves, call, dtype)
    return call.run(dtype)


@functools.lru_cache(maxsize=256)
def _variant(
    width: int, eps: float, add: bool, scaled: bool, weight: bool, gate: bool, gate_first: bool
) -> tuple[Variant, int]:
    """The kernel for one kind of call, and the rows that a program of it takes."""
    block, pieces, rows, warps = _layout(width)
    constants = {
        "EPS": eps, "ADD": add, "SCALED": scaled, "WEIGHT": weight, "GATE": gate,
        "GATE_FIRST": gate_first, "WIDTH": width, "PIECES": pieces, "BLOCK": block, "ROWS": rows,
    }  # fmt: skip
    return Variant(_forward, constants, num_warps=warps), rows


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _layout(width: int, numbers: int = _NUMBERS) -> tuple[int, int, int, int]:
    """Block and pieces of a row, rows and warps of a program."""
    block, pieces = _pieces(width)
    rows = _floor_to_power(numbers // (block * pieces), 1, numbers)
    return block, pieces, rows, _floor_to_power(4 * block * pieces // numbers, 4, 16)


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
