"""The selective scan on a GPU: which of its kernels runs, and the one in Triton.

There are three. wide.py, in CUDA C++, is for many rows, and for gradients; relay.py, in CUDA C++,
for few rows, without gradients; Triton's, below, wherever CUDA C++ cannot be compiled.

In Triton, one program runs a block of channels of one sequence from its first to its last token and
keeps the float32 state in registers. The forward saves the state at every `_CHUNK` tokens when
gradients are wanted; the backward walks the chunks from the last to the first, recomputes the
states inside each, and never stores all of them.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._backend import wants_cuda_cpp
from widefield.ops.selective_scan import _calls, relay, wide
from widefield.plan import LayerPlan, ScanInputs

_CHUNK = 32
_BLOCK = 32
_UNMODIFIED = LayerPlan()


_LOG2E = tl.constexpr(1.4426950216293335)  # log2(e), rounded to float32
_LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # what that rounding left


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    # exp of x ≤ 0; 0 below -87. Thousands of these are multiplied along a sequence, so an error
    # that leans to one side adds up: for float32 inputs the product is compensated and a polynomial
    # takes the place of the GPU's own exp2, which is two places off near 1.
    n = tl.floor(x * _LOG2E + 0.5)
    fraction = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -n))
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    if EXACT:
        p = tl.fma(fraction, 0.00015326471475418657, 0.0013390806270763278)
        p = tl.fma(fraction, p, 0.009618505835533142)
        p = tl.fma(fraction, p, 0.05550359934568405)
        p = tl.fma(fraction, p, 0.24022647738456726)
        p = tl.fma(fraction, p, 0.6931471824645996)
        p = tl.fma(fraction, p, 1.0)
    else:
        p = tl.exp2(fraction)
    return tl.where(x < -87.0, 0.0, p * power)


@triton.jit
def _sigmoid(v, EXACT: tl.constexpr):
    if EXACT:
        small = _exp(-tl.abs(v), EXACT)
        return tl.div_rn(tl.where(v < 0.0, small, 1.0), 1.0 + small)
    else:
        return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _log1p(u):
    # log(1 + u) of 0 ≤ u ≤ 1 as 2 artanh(u / (2 + u)): a series of eight terms is exact to
    # float32's last places,
    # which the GPU's own logarithm near 1 is not.
    s = tl.div_rn(u, 2.0 + u)
    q = s * s
    p = tl.fma(q, 1.0 / 15.0, 1.0 / 13.0)
    p = tl.fma(q, p, 1.0 / 11.0)
    p = tl.fma(q, p, 1.0 / 9.0)
    p = tl.fma(q, p, 1.0 / 7.0)
    p = tl.fma(q, p, 1.0 / 5.0)
    p = tl.fma(q, p, 1.0 / 3.0)
    return 2.0 * tl.fma(s * q, p, s)


@triton.jit
def _softplus(v):
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + _log1p(_exp(-tl.abs(v), True)))


@triton.jit
def _delta(
    raw, bias, scale, floor, SOFTPLUS: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr
):
    delta = raw + bias
    if SOFTPLUS:
        delta = _softplus(delta)
    if SCALE:
        delta = delta * scale
    if FLOOR:
        delta = tl.where(delta < floor, 0.0, delta)
    return delta


@triton.jit
def _place(row, ends_ptr, length, chunks, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    # A row's row in the tensors, its first token there, its length, its first saved state.
    if PACKED:
        begin = tl.load(ends_ptr + row)
        tokens = (tl.load(ends_ptr + row + 1) - begin).to(tl.int32)
        return row * 0, begin, tokens, begin // CHUNK + row
    else:
        return row, row * 0, length, row * chunks


@triton.jit
def _forward(
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    floor_ptr, scale_ptr, decay_ptr, valid_ptr, h0_ptr, ends_ptr,
    y_ptr, hT_ptr, saved_ptr,
    length, channels, states, chunks,
    sxb, sxl, sdb, sdl, sBb, sBl, sCb, sCl, szb, szl, svb, svl,
    floor_row, scale_row, decay_row,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    FLOOR: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr, VALID: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_H0: tl.constexpr, SAVE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    source, begin, tokens, chunk0 = _place(row, ends_ptr, length, chunks, PACKED, CHUNK)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    dm = d < channels
    nm = n < states
    m = dm[:, None] & nm[None, :]
    d64 = d.to(tl.int64)
    A = tl.load(A_ptr + d64[:, None] * states + n[None, :], mask=m, other=0.0)
    if DECAY:
        A = A * tl.load(decay_ptr + row * decay_row + d64, mask=dm, other=1.0)[:, None]
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d64, mask=dm, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d64, mask=dm, other=0.0).to(tl.float32)
    floor = tl.zeros((BLOCK,), tl.float32)
    if FLOOR:
        floor = tl.load(floor_ptr + row * floor_row + d64, mask=dm, other=0.0)
    scale = tl.zeros((BLOCK,), tl.float32)
    if SCALE:
        scale = tl.load(scale_ptr + row * scale_row + d64, mask=dm, other=1.0)
    state_offset = row * channels * states + d64[:, None] * states + n[None, :]
    h = tl.zeros((BLOCK, STATES), tl.float32)
    if HAS_H0:
        h = tl.load(h0_ptr + state_offset, mask=m, other=0.0)

    xp = x_ptr + source * sxb + begin * sxl + d64
    dp = delta_ptr + source * sdb + begin * sdl + d64
    bp = B_ptr + source * sBb + begin * sBl + n
    cp = C_ptr + source * sCb + begin * sCl + n
    zp = z_ptr + source * szb + begin * szl + d64
    vp = valid_ptr + source * svb
    yp = y_ptr + (source * length + begin) * channels + d64
    saved = saved_ptr + chunk0 * channels * states + d64[:, None] * states + n[None, :]
    # The next token's values are asked for before this token's are used: the loads overlap the
    # arithmetic.
    some = tokens > 0
    x_next = tl.load(xp, mask=dm & some, other=0.0)
    r_next = tl.load(dp, mask=dm & some, other=0.0)
    b_next = tl.load(bp, mask=nm & some, other=0.0)
    c_next = tl.load(cp, mask=nm & some, other=0.0)
    z_next = x_next
    if HAS_Z:
        z_next = tl.load(zp, mask=dm & some, other=0.0)
    for t in range(tokens):
        x = x_next.to(tl.float32)
        raw = r_next.to(tl.float32)
        b = b_next.to(tl.float32)
        c = c_next.to(tl.float32)
        z = z_next.to(tl.float32)
        xp += sxl
        dp += sdl
        bp += sBl
        cp += sCl
        more = t + 1 < tokens
        x_next = tl.load(xp, mask=dm & more, other=0.0)
        r_next = tl.load(dp, mask=dm & more, other=0.0)
        b_next = tl.load(bp, mask=nm & more, other=0.0)
        c_next = tl.load(cp, mask=nm & more, other=0.0)
        if HAS_Z:
            zp += szl
            z_next = tl.load(zp, mask=dm & more, other=0.0)
        if SAVE:
            if t % CHUNK == 0:
                tl.store(saved, h, mask=m)
                saved += channels.to(tl.int64) * states
        delta = _delta(raw, bias, scale, floor, SOFTPLUS, SCALE, FLOOR)
        if VALID:
            ok = tl.load(vp) != 0
            vp += svl
            delta = tl.where(ok, delta, 0.0)
            x = tl.where(ok, x, 0.0)
        else:
            ok = True
        h = _exp(delta[:, None] * A, EXACT) * h + (delta * x)[:, None] * b[None, :]
        y = tl.sum(h * c[None, :], axis=1)
        if HAS_D:
            y += skip * x
        if HAS_Z:
            y *= z * _sigmoid(z, EXACT)
        if VALID:
            y = tl.where(ok, y, 0.0)
        tl.store(yp, y.to(y_ptr.dtype.element_ty), mask=dm)
        yp += channels
    tl.store(hT_ptr + state_offset, h, mask=m)


@triton.jit
def _backward(
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    floor_ptr, scale_ptr, decay_ptr, valid_ptr, ends_ptr, saved_ptr,
    dy_ptr, dhT_ptr, scratch_ptr,
    dx_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dh0_ptr,
    batch, length, channels, states, chunks,
    sxb, sxl, sdb, sdl, sBb, sBl, sCb, sCl, szb, szl, svb, svl,
    floor_row, scale_row, decay_row,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    FLOOR: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr, VALID: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    source, begin, tokens, chunk0 = _place(row, ends_ptr, length, chunks, PACKED, CHUNK)
    block = tl.program_id(1).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    dm = d < channels
    nm = n < states
    m = dm[:, None] & nm[None, :]
    d64 = d.to(tl.int64)
    A = tl.load(A_ptr + d64[:, None] * states + n[None, :], mask=m, other=0.0)
    decay = tl.full((BLOCK,), 1.0, tl.float32)
    if DECAY:
        decay = tl.load(decay_ptr + row * decay_row + d64, mask=dm, other=1.0)
        A = A * decay[:, None]
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d64, mask=dm, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d64, mask=dm, other=0.0).to(tl.float32)
    floor = tl.zeros((BLOCK,), tl.float32)
    if FLOOR:
        floor = tl.load(floor_ptr + row * floor_row + d64, mask=dm, other=0.0)
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if SCALE:
        scale = tl.load(scale_ptr + row * scale_row + d64, mask=dm, other=1.0)
    tile = d64[:, None] * states + n[None, :]
    state_offset = row * channels * states + tile
    dh = tl.load(dhT_ptr + state_offset, mask=m, other=0.0)
    dA = tl.zeros((BLOCK, STATES), tl.float32)
    dD = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    inner = tl.arange(0, BLOCK)[:, None] * STATES + n[None, :]
    scratch = (
        scratch_ptr + (row * tl.num_programs(1) + block) * (CHUNK + 1) * BLOCK * STATES + inner
    )
    xp = x_ptr + source * sxb + begin * sxl + d64
    dp = delta_ptr + source * sdb + begin * sdl + d64
    bp = B_ptr + source * sBb + begin * sBl + n
    cp = C_ptr + source * sCb + begin * sCl + n
    zp = z_ptr + source * szb + begin * szl + d64
    vp = valid_ptr + source * svb
    out = (source * length + begin) * channels + d64
    partial = ((block * batch + source) * length + begin) * states + n
    here = tl.cdiv(tokens, CHUNK)
    for reverse in range(here):
        chunk = here - 1 - reverse
        first = (chunk * CHUNK).to(tl.int64)
        count = tl.minimum(CHUNK, tokens - chunk * CHUNK)
        h = tl.load(saved_ptr + (chunk0 + chunk) * channels * states + tile, mask=m, other=0.0)
        tl.store(scratch, h)
        for i in range(count):
            t = first + i
            x = tl.load(xp + t * sxl, mask=dm, other=0.0).to(tl.float32)
            raw = tl.load(dp + t * sdl, mask=dm, other=0.0).to(tl.float32)
            b = tl.load(bp + t * sBl, mask=nm, other=0.0).to(tl.float32)
            delta = _delta(raw, bias, scale, floor, SOFTPLUS, SCALE, FLOOR)
            if VALID:
                ok = tl.load(vp + t * svl) != 0
                delta = tl.where(ok, delta, 0.0)
                x = tl.where(ok, x, 0.0)
            h = _exp(delta[:, None] * A, EXACT) * h + (delta * x)[:, None] * b[None, :]
            tl.store(scratch + (i + 1) * BLOCK * STATES, h)
        tl.debug_barrier()
        # Sums of a chunk first, then of chunks: fewer roundings in a row.
        chunk_dA = tl.zeros((BLOCK, STATES), tl.float32)
        chunk_dD = tl.zeros((BLOCK,), tl.float32)
        chunk_dbias = tl.zeros((BLOCK,), tl.float32)
        for j in range(count):
            i = count - 1 - j
            t = first + i
            h = tl.load(scratch + (i + 1) * BLOCK * STATES)
            before = tl.load(scratch + i * BLOCK * STATES)
            x = tl.load(xp + t * sxl, mask=dm, other=0.0).to(tl.float32)
            raw = tl.load(dp + t * sdl, mask=dm, other=0.0).to(tl.float32) + bias
            b = tl.load(bp + t * sBl, mask=nm, other=0.0).to(tl.float32)
            c = tl.load(cp + t * sCl, mask=nm, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + out + t * channels, mask=dm, other=0.0).to(tl.float32)
            full = raw
            slope = scale
            if SOFTPLUS:
                full = _softplus(raw)
                slope = scale * _sigmoid(raw, EXACT)
            full = full * scale
            open = full == full
            if FLOOR:
                open = ~(full < floor)
            if VALID:
                ok = tl.load(vp + t * svl) != 0
                open = open & ok
                x = tl.where(ok, x, 0.0)
                dy = tl.where(ok, dy, 0.0)
            else:
                ok = True
            delta = tl.where(open, full, 0.0)
            if HAS_Z:
                z = tl.load(zp + t * szl, mask=dm, other=0.0).to(tl.float32)
                sigmoid = _sigmoid(z, EXACT)
                plain = tl.sum(h * c[None, :], axis=1) + skip * x
                dz = dy * plain * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store(dz_ptr + out + t * channels, dz.to(dz_ptr.dtype.element_ty), mask=dm)
                dy = dy * z * sigmoid
            dh += dy[:, None] * c[None, :]
            tl.store(dC_ptr + partial + t * states, tl.sum(dy[:, None] * h, axis=0), mask=nm)
            if HAS_D:
                chunk_dD += dy * x
            a = _exp(delta[:, None] * A, EXACT)
            through = dh * a * before
            into = tl.sum(dh * b[None, :], axis=1)
            dx = delta * into
            if HAS_D:
                dx += skip * dy
            tl.store(dx_ptr + out + t * channels, dx.to(dx_ptr.dtype.element_ty), mask=dm)
            ddelta = tl.where(open, tl.sum(through * A, axis=1) + into * x, 0.0) * slope
            tl.store(
                ddelta_ptr + out + t * channels, ddelta.to(ddelta_ptr.dtype.element_ty), mask=dm
            )
            chunk_dbias += ddelta
            chunk_dA += through * (delta * decay)[:, None]
            tl.store(
                dB_ptr + partial + t * states,
                tl.sum(dh * (delta * x)[:, None], axis=0),
                mask=nm,
            )
            dh = dh * a
        dA += chunk_dA
        dD += chunk_dD
        dbias += chunk_dbias
        tl.debug_barrier()
    tl.store(dh0_ptr + state_offset, dh, mask=m)
    tl.store(dA_ptr + state_offset, dA, mask=m)
    tl.store(dD_ptr + row * channels + d64, dD, mask=dm)
    tl.store(dbias_ptr + row * channels + d64, dbias, mask=dm)


def _dense_channels(tensor: Tensor | None) -> Tensor | None:
    """The kernels walk channels with stride 1; anything else is copied once."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _per_row(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Plan values (D,) or (B, D) as float32, and the stride from row to row."""
    if values is None:
        return None, 0
    values = values.float().contiguous()
    return values, 0 if values.ndim == 1 else values.shape[1]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, z: Tensor | None, bias: Tensor | None, h0: Tensor | None,
        softplus: bool, valid: Tensor | None, ends: Tensor | None, plan: LayerPlan | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, delta, B, C, z = (_dense_channels(t) for t in (x, delta, B, C, z))  # type: ignore[assignment]
        A = A.float().contiguous()
        h0 = None if h0 is None else h0.float().contiguous()
        D, bias = (None if t is None else t.contiguous() for t in (D, bias))
        batch, length, channels = x.shape
        states = A.shape[1]
        save = any(ctx.needs_input_grad)
        ends = None if ends is None else ends.to(x.device, torch.int64).contiguous()
        rows = batch if ends is None else len(ends) - 1
        chunks = -(-length // _CHUNK)
        saves = batch * chunks if ends is None else length // _CHUNK + rows
        y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        final = torch.empty(rows, channels, states, dtype=torch.float32, device=x.device)
        saved = final.new_empty(saves, channels, states) if save else final
        plan = plan or LayerPlan()
        floor, floor_row = _per_row(plan.delta_floor)
        scale, scale_row = _per_row(plan.delta_scale)
        decay, decay_row = _per_row(plan.decay_scale)
        flags = {
            "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None,
            "SOFTPLUS": softplus, "FLOOR": floor is not None, "SCALE": scale is not None,
            "DECAY": decay is not None, "VALID": valid is not None, "PACKED": ends is not None,
            "CHUNK": _CHUNK, "BLOCK": _BLOCK, "STATES": triton.next_power_of_2(states),
        }  # fmt: skip
        strides = (
            *_strides(x), *_strides(delta), *_strides(B), *_strides(C),
            *_strides(z), *_strides(valid),
            floor_row, scale_row, decay_row,
        )  # fmt: skip
        grid = (rows, triton.cdiv(channels, _BLOCK))
        # Absent inputs are passed as x: their flag keeps the kernel from reading them.
        present = (D, z, bias, floor, scale, decay, valid, h0, ends)
        optional = [x if t is None else t for t in present]
        with torch.cuda.device_of(x):
            _forward[grid](
                x, delta, A, B, C, *optional, y, final, saved,
                length, channels, states, chunks, *strides,
                HAS_H0=h0 is not None, SAVE=save, num_warps=1, **flags,
            )  # fmt: skip
        if save:
            ctx.save_for_backward(x, delta, A, B, C, *optional[:7], optional[8], saved)
            ctx.call = (flags, strides, grid, chunks)
            ctx.present = (D is not None, z is not None, bias is not None, h0 is not None)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, delta, A, B, C, D, z, bias, floor, scale, decay, valid, ends, saved = ctx.saved_tensors
        flags, strides, grid, chunks = ctx.call
        has_D, has_z, has_bias, has_h0 = ctx.present
        batch, length, channels = x.shape
        states = A.shape[1]
        rows, blocks = grid
        dy, dfinal = dy.contiguous(), dfinal.contiguous()

        def dense(dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, length, channels, dtype=dtype, device=x.device)

        wide = {"dtype": torch.float32, "device": x.device}
        dx, ddelta = dense(x.dtype), dense(delta.dtype)
        dz = dense(z.dtype) if has_z else dx
        dA = torch.empty(rows, channels, states, **wide)
        dh0 = torch.empty(rows, channels, states, **wide)
        dB = torch.empty(blocks, batch, length, states, **wide)
        dC = torch.empty(blocks, batch, length, states, **wide)
        dD = torch.empty(rows, channels, **wide)
        dbias = torch.empty(rows, channels, **wide)
        scratch = torch.empty(
            rows * blocks * (_CHUNK + 1) * flags["BLOCK"] * flags["STATES"], **wide
        )
        with torch.cuda.device_of(x):
            _backward[grid](
                x, delta, A, B, C, D, z, bias, floor, scale, decay, valid, ends, saved,
                dy, dfinal, scratch, dx, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
                batch, length, channels, states, chunks, *strides, num_warps=1, **flags,
            )  # fmt: skip
        return (
            dx, ddelta, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
            dD.sum(0).to(D.dtype) if has_D else None,
            dz if has_z else None,
            dbias.sum(0).to(bias.dtype) if has_bias else None,
            dh0 if has_h0 else None,
            None, None, None, None,
        )  # fmt: skip


def selective_scan(inputs: ScanInputs, plan: LayerPlan | None = None) -> tuple[Tensor, Tensor]:
    """Selective scan on a GPU; the same contract as the reference.

    Args:
        inputs: what the scan reads; see `ScanInputs`.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    plan = plan or _UNMODIFIED
    if not torch.is_grad_enabled() and wants_cuda_cpp() and not torch.compiler.is_compiling():
        found = relay.again(inputs, plan)
        if found is not None:
            return found
    kernel = _chosen(inputs)
    if kernel is None:
        return triton_scan(inputs, plan)
    if kernel is relay:
        return relay.selective_scan(inputs, plan, keep=True)
    return kernel.selective_scan(inputs, plan)


def _chosen(inputs: ScanInputs) -> ModuleType | None:
    """The module in CUDA C++ that runs the scan, or None for Triton."""
    if torch.compiler.is_compiling() or not (inputs.x.is_cuda and wants_cuda_cpp()):
        return None
    few = not (wide.wants_gradients(inputs) or _are_many(inputs))
    if few and relay.supports(inputs):
        return relay
    return wide if wide.supports(inputs) else None


def _are_many(inputs: ScanInputs) -> bool:
    """Whether each of the GPU's warp schedulers gets a warp of a lane a channel; two, of long rows.

    Measured on an H200 (benchmarks/LOG.md): from about there on wide.py is faster. Long rows are
    shared by relay.py's blocks as well as one row is.
    """
    batch, tokens, channels = inputs.x.shape
    rows = _calls.rows_of(inputs.x, inputs.cu_seqlens)
    warps = 2 if batch * tokens >= 1024 * rows else 1
    return rows * channels >= warps * 4 * 32 * _multiprocessors(inputs.x.get_device())


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def triton_scan(inputs: ScanInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    """The scan in Triton, differentiable; the same contract."""
    return _Scan.apply(
        inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z,
        inputs.delta_bias, inputs.initial_state, inputs.delta_softplus, inputs.valid,
        inputs.cu_seqlens, plan,
    )  # fmt: skip
