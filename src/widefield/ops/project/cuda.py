"""A linear projection of one token a row in Triton: at its floor, the reading of the weights.

A program has some rows of the weight in registers and goes over the batch with them. Where it may
start while the kernel before it still runs, it reads its weights meanwhile.
"""
# What a flag of the kernel switches off has no value there, and no use.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._early import early
from widefield.ops.project import reference
from widefield.ops.project.reference import Convolution
from widefield.ops.state_update._triton import silu

_TILE = 8192  # weights of a program
_PROGRAMS = 132
_WARPS = 4


@triton.jit
def _project(
    x_ptr, weight_ptr, y_ptr, bias_ptr, gate_ptr, norm_ptr, residual_ptr,
    state_ptr, taps_ptr, shift_ptr,
    outputs, features, eps, first, channels, x_row, gate_row, residual_row,
    BIAS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    TAPS: tl.constexpr, SHIFT: tl.constexpr, EARLY: tl.constexpr, BATCH: tl.constexpr,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, FEATURES)
    inside, real = n < outputs, k < features
    both = inside[:, None] & real[None, :]
    weight = tl.load(weight_ptr + n[:, None] * features + k[None, :], mask=both, other=0.0)
    if NORM:
        scale = tl.load(norm_ptr + k, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if TAPS > 0:
        c = n - first
        convolved = inside & (c >= 0) & (c < channels)
        j = tl.arange(0, PADDED)
        taps = tl.load(
            taps_ptr + c[:, None] * TAPS + j[None, :],
            mask=convolved[:, None] & (j < TAPS)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if SHIFT:
            shift = tl.load(shift_ptr + c, mask=convolved, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for row in range(BATCH):
        at = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + at * x_row + k, mask=real, other=0.0).to(tl.float32)
        if TAPS > 0:
            older = tl.load(
                state_ptr + (at * channels + c)[:, None] * TAPS + j[None, :] + 1,
                mask=convolved[:, None] & (j < TAPS - 1)[None, :], other=0.0,
            )  # fmt: skip
        if RESIDUAL:
            added = tl.load(residual_ptr + at * residual_row + n, mask=inside, other=0.0)
        if GATE:
            gate = tl.load(gate_ptr + at * gate_row + k, mask=real, other=0.0)
            x *= silu(gate.to(tl.float32))
        if NORM:
            x = x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=0) / features + eps)) * scale
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
        if BIAS:
            y += bias
        if TAPS > 0:
            # No thread writes a state before all have read it.
            tl.debug_barrier()
            newest = y.to(state_ptr.dtype.element_ty)
            held = tl.where((j == TAPS - 1)[None, :], newest[:, None], older)
            tl.store(
                state_ptr + (at * channels + c)[:, None] * TAPS + j[None, :], held,
                mask=convolved[:, None] & (j < TAPS)[None, :],
            )  # fmt: skip
            total = tl.sum(taps * held.to(tl.float32), axis=1)
            if SHIFT:
                total += shift
            y = tl.where(convolved, silu(total), y)
        if RESIDUAL:
            y += added.to(tl.float32)
        tl.store(y_ptr + at * outputs + n, y.to(y_ptr.dtype.element_ty), mask=inside)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    convolution: Convolution | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A projection of a few rows on a GPU; a state that is not dense goes through the reference."""
    if convolution is not None and not convolution.state.is_contiguous():
        return reference.project(
            *(x, weight, bias),
            gate=gate,
            norm=norm,
            eps=eps,
            convolution=convolution,
            residual=residual,
            dtype=dtype,
        )
    batch, features = x.shape
    outputs = weight.shape[0]
    y = torch.empty(batch, outputs, dtype=dtype or x.dtype, device=x.device)
    x, gate, residual = _dense(x), *(None if t is None else _dense(t) for t in (gate, residual))
    # Absent inputs are passed as x: their flag keeps the kernel from reading them.
    shift, gated, scale, added = (x if t is None else t for t in (bias, gate, norm, residual))
    state, taps, offset, conv = _convolution(convolution, x)
    padded = triton.next_power_of_2(features)
    block = max(1, _TILE // padded)
    while block > 1 and triton.cdiv(outputs, block) < _PROGRAMS:
        block //= 2
    with torch.cuda.device_of(x):
        _project[(triton.cdiv(outputs, block),)](
            x, weight.contiguous(), y, shift, gated, scale, added, state, taps, offset,
            outputs, features, eps, 0 if convolution is None else convolution.first,
            state.shape[1], x.stride(0), gated.stride(0), added.stride(0),
            BIAS=bias is not None, GATE=gate is not None, NORM=norm is not None,
            RESIDUAL=residual is not None, BATCH=batch, BLOCK=block, FEATURES=padded,
            num_warps=_WARPS, **conv, **early(x),
        )  # fmt: skip
    return y


def _dense(tensor: Tensor) -> Tensor:
    """With a dense last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _convolution(
    convolution: Convolution | None, absent: Tensor
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """State, filters, bias and the kernel's flags."""
    if convolution is None:
        return absent, absent, absent, {"TAPS": 0, "SHIFT": False, "PADDED": 1}
    shift = absent if convolution.bias is None else convolution.bias
    taps = convolution.weight.shape[1]
    flags = {"TAPS": taps, "SHIFT": convolution.bias is not None}
    flags["PADDED"] = triton.next_power_of_2(taps)
    return convolution.state, convolution.weight.contiguous(), shift, flags
