"""Depthwise causal convolution in Triton, forward and backward, channels-last."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TIME = 64
_BLOCK = 64


@triton.jit
def _preactivation(
    x_ptr, w_ptr, bias_ptr, s_ptr, row, t, d, dm, length, channels, sxb, sxl,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, K: tl.constexpr,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((TIME, BLOCK), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=dm, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        source = t - (K - 1) + k
        inside = (source >= 0) & (source < length)
        x = tl.load(
            x_ptr + row * sxb + source[:, None] * sxl + d[None, :],
            mask=inside[:, None] & dm[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_STATE:
            before = tl.load(
                s_ptr + (row * channels + d[None, :]) * K + (source[:, None] + K),
                mask=((source < 0) & (source + K >= 0))[:, None] & dm[None, :],
                other=0.0,
            ).to(tl.float32)
            x += before
        w = tl.load(w_ptr + d * K + k, mask=dm, other=0.0).to(tl.float32)
        acc += w[None, :] * x
    return acc


@triton.jit
def _forward(
    x_ptr, w_ptr, bias_ptr, s_ptr, y_ptr, last_ptr, length, channels, sxb, sxl,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TIME + tl.arange(0, TIME)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dm = d < channels
    acc = _preactivation(
        x_ptr, w_ptr, bias_ptr, s_ptr, row, t, d, dm, length, channels, sxb, sxl,
        HAS_BIAS, HAS_STATE, K, TIME, BLOCK,
    )  # fmt: skip
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    tl.store(
        y_ptr + (row * length + t[:, None]) * channels + d[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(t < length)[:, None] & dm[None, :],
    )
    if (tl.program_id(0) + 1) * TIME >= length:
        x_ptr += row * sxb + d
        at = (row * channels + d) * K
        for k in tl.static_range(K):
            source = tl.cast(length, tl.int64) - K + k
            last = tl.load(x_ptr + source * sxl, mask=dm & (source >= 0), other=0.0)
            if HAS_STATE:
                before = tl.load(s_ptr + at + (source + K), mask=dm & (source < 0), other=0.0)
                last += before.to(last.dtype)
            tl.store(last_ptr + at + k, last, mask=dm)


@triton.jit
def _activation_gradient(
    x_ptr, w_ptr, bias_ptr, s_ptr, dy_ptr, g_ptr, length, channels, sxb, sxl,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TIME + tl.arange(0, TIME)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dm = d < channels
    m = (t < length)[:, None] & dm[None, :]
    at = (row * length + t[:, None]) * channels + d[None, :]
    g = tl.load(dy_ptr + at, mask=m, other=0.0).to(tl.float32)
    if SILU:
        acc = _preactivation(
            x_ptr, w_ptr, bias_ptr, s_ptr, row, t, d, dm, length, channels, sxb, sxl,
            HAS_BIAS, HAS_STATE, K, TIME, BLOCK,
        )  # fmt: skip
        sigmoid = 1.0 / (1.0 + tl.exp(-acc))
        g = g * sigmoid * (1.0 + acc * (1.0 - sigmoid))
    tl.store(g_ptr + at, g, mask=m)


@triton.jit
def _input_gradient(
    x_ptr, w_ptr, s_ptr, g_ptr, dx_ptr, dw_ptr, db_ptr, length, channels, sxb, sxl,
    HAS_STATE: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    t = tile * TIME + tl.arange(0, TIME)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dm = d < channels
    m = (t < length)[:, None] & dm[None, :]
    here = tl.load(g_ptr + (row * length + t[:, None]) * channels + d[None, :], mask=m, other=0.0)
    dx = tl.zeros((TIME, BLOCK), tl.float32)
    part = (row * tl.num_programs(0) + tile) * channels + d
    for k in tl.static_range(K):
        later = t + (K - 1) - k
        g = tl.load(
            g_ptr + (row * length + later[:, None]) * channels + d[None, :],
            mask=(later < length)[:, None] & dm[None, :],
            other=0.0,
        )
        w = tl.load(w_ptr + d * K + k, mask=dm, other=0.0).to(tl.float32)
        dx += w[None, :] * g
        source = t - (K - 1) + k
        x = tl.load(
            x_ptr + row * sxb + source[:, None] * sxl + d[None, :],
            mask=((source >= 0) & (source < length))[:, None] & dm[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_STATE:
            x += tl.load(
                s_ptr + (row * channels + d[None, :]) * K + (source[:, None] + K),
                mask=((source < 0) & (source + K >= 0))[:, None] & dm[None, :],
                other=0.0,
            ).to(tl.float32)
        tl.store(dw_ptr + part * K + k, tl.sum(here * x, axis=0), mask=dm)
    tl.store(db_ptr + part, tl.sum(here, axis=0), mask=dm)
    tl.store(
        dx_ptr + (row * length + t[:, None]) * channels + d[None, :],
        dx.to(dx_ptr.dtype.element_ty),
        mask=m,
    )


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The outputs and the last K inputs; x has dense channels, weight and state are contiguous."""
    batch, length, channels = x.shape
    kernel = weight.shape[1]
    y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    last = torch.empty(batch, channels, kernel, dtype=x.dtype, device=x.device)
    # Absent inputs are passed as x: their flag keeps the kernel from reading them.
    bias_, state_ = (x if t is None else t for t in (bias, state))
    with torch.cuda.device_of(x):
        _forward[_grid(x)](
            x, weight, bias_, state_, y, last, length, channels, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, HAS_STATE=state is not None, SILU=silu, K=kernel,
            TIME=_TIME, BLOCK=_BLOCK,
        )  # fmt: skip
    return y, last


def _grid(x: Tensor) -> tuple[int, int, int]:
    batch, length, channels = x.shape
    return triton.cdiv(length, _TIME), triton.cdiv(channels, _BLOCK), batch


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last = _convolved(x, weight, bias, silu, state)
        ctx.mark_non_differentiable(last)
        ctx.grid = _grid(x)
        ctx.flags = {
            "HAS_STATE": state is not None, "K": weight.shape[1], "TIME": _TIME, "BLOCK": _BLOCK,
        }  # fmt: skip
        ctx.silu, ctx.has_bias = silu, bias is not None
        bias_, state_ = (x if t is None else t for t in (bias, state))
        ctx.save_for_backward(x, weight, bias_, state_)
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, state = ctx.saved_tensors
        dy = dy.contiguous()
        batch, length, channels = x.shape
        kernel = weight.shape[1]
        wide = {"dtype": torch.float32, "device": x.device}
        g = torch.empty(batch, length, channels, **wide)
        dx = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        dw = torch.empty(batch * ctx.grid[0], channels, kernel, **wide)
        db = torch.empty(batch * ctx.grid[0], channels, **wide)
        common = (length, channels, x.stride(0), x.stride(1))
        with torch.cuda.device_of(x):
            _activation_gradient[ctx.grid](
                x, weight, bias, state, dy, g, *common,
                HAS_BIAS=ctx.has_bias, SILU=ctx.silu, **ctx.flags,
            )  # fmt: skip
            _input_gradient[ctx.grid](x, weight, state, g, dx, dw, db, *common, **ctx.flags)
        dbias = db.sum(0).to(bias.dtype) if ctx.has_bias else None
        return dx, dw.sum(0).to(weight.dtype), dbias, None, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution on a GPU; the same contract as the reference.

    Gradients reach x, weight and bias; the initial state gets none.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    if torch.is_grad_enabled():
        y, _ = _Convolution.apply(x, weight, bias, silu, state)
        return y, _last_inputs(x, weight.shape[1], initial_state)
    return _convolved(x, weight, bias, silu, state)


def _last_inputs(x: Tensor, kernel: int, state: Tensor | None) -> Tensor:
    """The last K inputs (B, D, K), from the state or zeros where x is shorter."""
    tail = x[:, -kernel:].transpose(1, 2)
    missing = kernel - tail.shape[-1]
    if missing:
        if state is None:
            before = tail.new_zeros(*tail.shape[:2], missing)
        else:
            before = state[..., -missing:].to(tail.dtype)
        tail = torch.cat([before, tail], dim=-1)
    return tail.contiguous()
