"""Depthwise causal convolution in Triton, forward and backward, channels-last."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._backend import on_device_of
from widefield.ops._triton import Variant, blocks, power_of_two
from widefield.ops.causal_conv1d import reference

_TIME = 64
_BLOCK = 64
_SEGMENT = 64  # tokens of a program of the forward
_AHEAD = 8
_WIDTH = 256  # channels of a program of the forward
_WARPS = 2


@triton.jit
def _sequence(seq_ptr, cu_ptr, row, t, length, PACKED: tl.constexpr):
    # The number of each token's sequence, and where that begins.
    sequence = row + tl.zeros_like(t)
    begin = tl.zeros_like(t)
    if PACKED:
        sequence = tl.load(seq_ptr + t, mask=t < length, other=0).to(tl.int64)
        begin = tl.load(cu_ptr + sequence, mask=t < length, other=0).to(tl.int64)
    return sequence, begin


@triton.jit
def _preactivation(
    x_ptr, w_ptr, bias_ptr, s_ptr, row, t, sequence, begin, d, dm, length, channels, sxb, sxl,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, K: tl.constexpr,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((TIME, BLOCK), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=dm, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        source = t - (K - 1) + k
        inside = (source >= begin) & (source < length)
        x = tl.load(
            x_ptr + row * sxb + source[:, None] * sxl + d[None, :],
            mask=inside[:, None] & dm[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_STATE:
            place = source - begin + K
            x += tl.load(
                s_ptr + (sequence[:, None] * channels + d[None, :]) * K + place[:, None],
                mask=((place < K) & (place >= 0))[:, None] & dm[None, :],
                other=0.0,
            ).to(tl.float32)
        w = tl.load(w_ptr + d * K + k, mask=dm, other=0.0).to(tl.float32)
        acc += w[None, :] * x
    return acc


@triton.jit
def _before(
    x_ptr, s_ptr, seq_ptr, cu_ptr, row, t, d, dm, channels, sxb, sxl,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # The K - 1 inputs in front of token t, the oldest first, from x or from its sequence's state.
    number = row
    begin = t * 0
    if PACKED:
        number = tl.load(seq_ptr + t).to(tl.int64)
        begin = tl.load(cu_ptr + number).to(tl.int64)
    found = ()
    for k in tl.static_range(K - 1):
        source = t - (K - 1) + k
        x = tl.load(x_ptr + row * sxb + source * sxl + d, mask=dm & (source >= begin), other=0.0)
        x = x.to(tl.float32)
        if HAS_STATE:
            at = s_ptr + (number * channels + d) * K + (source - begin + K)
            x += tl.load(at, mask=dm & (source < begin), other=0.0).to(tl.float32)
        found = found + (x,)  # noqa: RUF005
    return found


@triton.jit
def _forward(
    x_ptr, w_ptr, bias_ptr, s_ptr, seq_ptr, cu_ptr, y_ptr, last_ptr, length, channels, sxb, sxl,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    K: tl.constexpr, SEGMENT: tl.constexpr, AHEAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Some channels of a segment of the tokens, one token after the other: every input is read once,
    # AHEAD of them before the first is used.
    row = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * SEGMENT
    d = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    dm = d < channels
    taps = ()
    for k in tl.static_range(K):
        tap = tl.load(w_ptr + d * K + k, mask=dm, other=0.0)
        taps = taps + (tap.to(tl.float32),)  # noqa: RUF005
    bias = tl.zeros((WIDTH,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=dm, other=0.0).to(tl.float32)
    before = _before(
        x_ptr, s_ptr, seq_ptr, cu_ptr, row, start, d, dm, channels, sxb, sxl, HAS_STATE, PACKED, K
    )  # fmt: skip
    for step in range(SEGMENT // AHEAD):
        first = start + step * AHEAD
        read = ()
        for u in tl.static_range(AHEAD):
            x = tl.load(
                x_ptr + row * sxb + (first + u) * sxl + d,
                mask=dm & (first + u < length),
                other=0.0,
            )
            read = read + (x,)  # noqa: RUF005
        for u in tl.static_range(AHEAD):
            t = first + u
            if PACKED:
                number = tl.load(seq_ptr + t, mask=t < length, other=0).to(tl.int64)
                begins = tl.load(cu_ptr + number).to(tl.int64) == t
                kept = ()
                for k in tl.static_range(K - 1):
                    fresh = tl.zeros((WIDTH,), tl.float32)
                    if HAS_STATE:
                        at = s_ptr + (number * channels + d) * K + k + 1
                        fresh = tl.load(at, mask=dm & begins, other=0.0).to(tl.float32)
                    kept = kept + (tl.where(begins, fresh, before[k]),)  # noqa: RUF005
                before = kept
            x = read[u].to(tl.float32)  # type: ignore[attr-defined]
            y = bias + taps[K - 1] * x
            for k in tl.static_range(K - 1):
                y += taps[k] * before[k]  # type: ignore[operator]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(
                y_ptr + (row * length + t) * channels + d,
                y.to(y_ptr.dtype.element_ty),
                mask=dm & (t < length),
            )
            before = before[1:] + (x,)  # noqa: RUF005
    if not PACKED:
        if start + SEGMENT >= length:
            at = (row * channels + d) * K
            for k in tl.static_range(K):
                source = tl.cast(length, tl.int64) - K + k
                last = tl.load(
                    x_ptr + row * sxb + source * sxl + d, mask=dm & (source >= 0), other=0.0
                )
                if HAS_STATE:
                    held = tl.load(s_ptr + at + (source + K), mask=dm & (source < 0), other=0.0)
                    last += held.to(last.dtype)
                tl.store(last_ptr + at + k, last, mask=dm)


@triton.jit
def _activation_gradient(
    x_ptr, w_ptr, bias_ptr, s_ptr, seq_ptr, cu_ptr, dy_ptr, g_ptr, length, channels, sxb, sxl,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    K: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TIME + tl.arange(0, TIME)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dm = d < channels
    m = (t < length)[:, None] & dm[None, :]
    at = (row * length + t[:, None]) * channels + d[None, :]
    g = tl.load(dy_ptr + at, mask=m, other=0.0).to(tl.float32)
    if SILU:
        sequence, begin = _sequence(seq_ptr, cu_ptr, row, t, length, PACKED)
        acc = _preactivation(
            x_ptr, w_ptr, bias_ptr, s_ptr, row, t, sequence, begin, d, dm, length, channels,
            sxb, sxl, HAS_BIAS, HAS_STATE, K, TIME, BLOCK,
        )  # fmt: skip
        sigmoid = 1.0 / (1.0 + tl.exp(-acc))
        g = g * sigmoid * (1.0 + acc * (1.0 - sigmoid))
    tl.store(g_ptr + at, g, mask=m)


@triton.jit
def _input_gradient(
    x_ptr, w_ptr, s_ptr, seq_ptr, cu_ptr, g_ptr, dx_ptr, dw_ptr, db_ptr, length, channels, sxb, sxl,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, K: tl.constexpr,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    t = tile * TIME + tl.arange(0, TIME)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dm = d < channels
    m = (t < length)[:, None] & dm[None, :]
    here = tl.load(g_ptr + (row * length + t[:, None]) * channels + d[None, :], mask=m, other=0.0)
    dx = tl.zeros((TIME, BLOCK), tl.float32)
    sequence, begin = _sequence(seq_ptr, cu_ptr, row, t, length, PACKED)
    part = (row * tl.num_programs(0) + tile) * channels + d
    for k in tl.static_range(K):
        later = t + (K - 1) - k
        _, its_begin = _sequence(seq_ptr, cu_ptr, row, later, length, PACKED)
        g = tl.load(
            g_ptr + (row * length + later[:, None]) * channels + d[None, :],
            mask=((later < length) & (its_begin <= t))[:, None] & dm[None, :],
            other=0.0,
        )
        w = tl.load(w_ptr + d * K + k, mask=dm, other=0.0).to(tl.float32)
        dx += w[None, :] * g
        source = t - (K - 1) + k
        x = tl.load(
            x_ptr + row * sxb + source[:, None] * sxl + d[None, :],
            mask=((source >= begin) & (source < length))[:, None] & dm[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_STATE:
            place = source - begin + K
            x += tl.load(
                s_ptr + (sequence[:, None] * channels + d[None, :]) * K + place[:, None],
                mask=((place < K) & (place >= 0))[:, None] & dm[None, :],
                other=0.0,
            ).to(tl.float32)
        tl.store(dw_ptr + part * K + k, tl.sum(here * x, axis=0), mask=dm)
    tl.store(db_ptr + part, tl.sum(here, axis=0), mask=dm)
    tl.store(
        dx_ptr + (row * length + t[:, None]) * channels + d[None, :],
        dx.to(dx_ptr.dtype.element_ty),
        mask=m,
    )


@functools.cache
def _variant(
    channels: int, has_bias: bool, has_state: bool, packed: bool, silu: bool, kernel: int
) -> tuple[Variant, int]:
    """The forward for one kind of call, and how many programs share the channels."""
    width = min(_WIDTH, power_of_two(channels))
    constants = {
        "HAS_BIAS": has_bias, "HAS_STATE": has_state, "PACKED": packed, "SILU": silu, "K": kernel,
        "SEGMENT": _SEGMENT, "AHEAD": _AHEAD, "WIDTH": width,
    }  # fmt: skip
    return Variant(_forward, constants, num_warps=_WARPS), blocks(channels, width)


def _launch(
    x: Tensor, tensors: tuple[Tensor, ...], common: tuple[int, ...], switches: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The outputs, and the last K inputs unless sequences are packed."""
    batch, length, channels = x.shape
    variant, parts = _variant(channels, *switches)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty(batch, channels, switches[-1])
    with on_device_of(x):
        variant.launch((-(-length // _SEGMENT), parts, batch), (*tensors, y, last), common)
    return y, last


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Without gradients and packing: what a prefill does in every layer."""
    x = x if x.stride(2) == 1 else x.contiguous()
    weight = weight.contiguous()
    held = x if state is None else state.contiguous()
    common = (x.shape[1], x.shape[2], x.stride(0), x.stride(1))
    switches = (bias is not None, state is not None, False, silu, weight.shape[1])
    return _launch(x, (x, weight, x if bias is None else bias, held, x, x), common, switches)


class _Call:
    """The tensors of one call, as the kernels read them."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:  # fmt: skip
        batch, length, channels = x.shape
        self.grid = (blocks(length, _TIME), blocks(channels, _BLOCK), batch)
        # Absent inputs are passed as x: their flag keeps the kernels from reading them.
        self.bias, self.state = (x if t is None else t for t in (bias, state))
        self.packing = (x, x)
        if cu_seqlens is not None:
            places = torch.arange(length, device=x.device, dtype=cu_seqlens.dtype)
            numbers = torch.searchsorted(cu_seqlens, places, right=True, out_int32=True) - 1
            self.packing = (numbers, cu_seqlens)
        self.common = (length, channels, x.stride(0), x.stride(1))
        self.layout = {"K": weight.shape[1], "HAS_STATE": state is not None,
                       "PACKED": cu_seqlens is not None}  # fmt: skip
        self.switches = {
            "HAS_BIAS": bias is not None, "HAS_STATE": state is not None,
            "PACKED": cu_seqlens is not None, "SILU": silu, "K": weight.shape[1],
        }  # fmt: skip

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, and the last K inputs unless sequences are packed."""
        tensors = (x, weight, self.bias, self.state, *self.packing)
        return _launch(x, tensors, self.common, tuple(self.switches.values()))

    def backward(self, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, of the weight and of the bias; the latter two in float32."""
        batch, length, channels = x.shape
        wide = {"dtype": torch.float32, "device": x.device}
        g = torch.empty(batch, length, channels, **wide)
        dx = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        dw = torch.empty(batch * self.grid[0], channels, weight.shape[1], **wide)
        db = torch.empty(batch * self.grid[0], channels, **wide)
        with torch.cuda.device_of(x):
            _activation_gradient[self.grid](
                x, weight, self.bias, self.state, *self.packing, dy, g, *self.common,
                **self.switches, TIME=_TIME, BLOCK=_BLOCK,
            )  # fmt: skip
            _input_gradient[self.grid](
                x, weight, self.state, *self.packing, g, dx, dw, db, *self.common,
                **self.layout, TIME=_TIME, BLOCK=_BLOCK,
            )  # fmt: skip
        return dx, dw.sum(0), db.sum(0)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, _ = _Call(x, weight, bias, silu, state, cu_seqlens).forward(x, weight)
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        call = _Call(x, weight, bias, ctx.silu, state, cu_seqlens)
        dx, dw, db = call.backward(x, weight, dy.contiguous())
        dbias = None if bias is None else db.to(bias.dtype)
        return dx, dw.to(weight.dtype), dbias, None, None, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution on a GPU; the same contract as the reference.

    Gradients reach x, weight and bias; the initial state gets none.
    """
    if not torch.is_grad_enabled() and cu_seqlens is None:
        return _convolve(x, weight, bias, silu, initial_state)
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight.contiguous()
    state = None if initial_state is None else initial_state.contiguous()
    if torch.is_grad_enabled():
        y, last = _Convolution.apply(x, weight, bias, silu, state, cu_seqlens), None
    else:
        y, last = _Call(x, weight, bias, silu, state, cu_seqlens).forward(x, weight)
    if cu_seqlens is not None:
        return y, reference.last_of_each(x, weight.shape[1], initial_state, cu_seqlens)
    return y, _last_inputs(x, weight.shape[1], initial_state) if last is None else last


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
