"""The causal convolution on the CPU: channels-last as it comes, with the silu fused."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._numba import (
    BYTES,
    WIDTH,
    Kernel,
    arguments,
    fma,
    inlined,
    load,
    load_number,
    load_some,
    next_task,
    store,
    store_number,
    store_some,
)
from widefield.ops._numba import silu as silu_of

CHUNK = 128  # tokens of one task
SEGMENT = 1024  # tokens that are widened at once where the input is not float32


@inlined
def _any_taps(
    t, y, x, x_stride, before, before_stride, weight, bias, channels, first, taps, apply_silu
):
    """Token t, from channel `first` on. `before` holds the taps - 1 tokens before token 0."""
    for block in range(first, channels, WIDTH):
        count, at = channels - block, block * BYTES
        total = load_some(bias + at, count)
        for k in range(taps):
            source = t - taps + 1 + k
            if source < 0:
                here = before + (source + taps - 1) * before_stride * BYTES
            else:
                here = x + source * x_stride * BYTES
            tap = load_some(weight + k * channels * BYTES + at, count)
            total = fma(tap, load_some(here + at, count), total)
        if apply_silu != 0:
            total = silu_of(total)
        store_some(y + at, total, count)


@inlined
def _four_taps(y, x, x_stride, weight, bias, channels, apply_silu):
    """The same for the usual filter, whole blocks, and a token behind the third: no branches."""
    row, step = x_stride * BYTES, channels * BYTES
    for block in range(0, channels - WIDTH + 1, WIDTH):
        at = block * BYTES
        here, tap = x + at, weight + at
        total = fma(load(tap), load(here - 3 * row), load(bias + at))
        total = fma(load(tap + step), load(here - 2 * row), total)
        total = fma(load(tap + 2 * step), load(here - row), total)
        total = fma(load(tap + 3 * step), load(here), total)
        if apply_silu != 0:
            total = silu_of(total)
        store(y + at, total)


@inlined
def _chunk(
    task, chunks, length, channels, taps, apply_silu,
    y, y_row, y_stride, x, x_row, x_stride, before, before_row, before_stride, weight, bias,
):  # fmt: skip
    """Some tokens of one row."""
    row, start = task // chunks, task % chunks * CHUNK
    source = x + row * x_row * BYTES
    earlier = before + row * before_row * BYTES
    for t in range(start, min(start + CHUNK, length)):
        out = y + (row * y_row + t * y_stride) * BYTES
        first = 0
        if taps == 4 and t >= 3:
            here = source + t * x_stride * BYTES
            _four_taps(out, here, x_stride, weight, bias, channels, apply_silu)
            first = channels // WIDTH * WIDTH
        _any_taps(
            t, out, source, x_stride, earlier, before_stride, weight, bias, channels, first,
            taps, apply_silu,
        )  # fmt: skip


@Kernel
def _convolve(call):
    while True:
        task = next_task(call)
        if task < 0:
            return
        _chunk(task, *arguments(call, 16))


@inlined
def _step(row, channels, taps, apply_silu, y, new, x, x_row, old, weight, bias):
    """One token of one row; its state (D, K) goes from `old` to `new`. Bias 0: None."""
    y += row * channels * BYTES
    for d in range(channels):
        at = (row * channels + d) * taps * BYTES
        for k in range(taps - 1):
            store_number(new + at + k * BYTES, load_number(old + at + (k + 1) * BYTES))
        newest = load_number(x + (row * x_row + d) * BYTES)
        store_number(new + at + (taps - 1) * BYTES, newest)
        total = 0.0
        if bias != 0:
            total += load_number(bias + d * BYTES)
        for k in range(taps):
            tap = load_number(weight + (d * taps + k) * BYTES)
            total += tap * load_number(new + at + k * BYTES)
        store_number(y + d * BYTES, total)
    if apply_silu != 0:
        for block in range(0, channels, WIDTH):
            here, count = y + block * BYTES, channels - block
            store_some(here, silu_of(load_some(here, count)), count)


@Kernel
def _one_step(call):
    while True:
        row = next_task(call)
        if row < 0:
            return
        _step(row, *arguments(call, 10))


def causal_conv1d(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
    initial_state: Float[Tensor, "batch channels kernel"] | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch channels kernel"]]:
    """Causal depthwise convolution with the signature of the reference; its sums are float32.

    Args:
        x: inputs, float32, bfloat16 or float16; a strided view is read in place.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.
        initial_state: the last K inputs before x, or None for zeros.

    Returns:
        y, dense, in the dtype of x, and the last K inputs (B, D, K).
    """
    with torch.no_grad():
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = weight.to(x.dtype).float()
        bias = None if bias is None else bias.to(x.dtype).float().contiguous()
        if x.shape[1] == 1 and initial_state is not None:
            return _one_token(x, weight, bias, silu, initial_state)
        return _many_tokens(x, weight, bias, silu, initial_state)


def _many_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, taps)
    state = initial_state.to(x.dtype).transpose(1, 2)  # (B, K, D), as x lies
    weight = weight.t().contiguous()
    bias = weight.new_zeros(channels) if bias is None else bias
    y = torch.empty(x.shape, dtype=x.dtype)
    step = length if x.dtype == torch.float32 else SEGMENT
    for start in range(0, length, step):
        part = x[:, start : start + step]
        wide, before = part.float(), state[:, 1:].float().contiguous()
        out = y if y.dtype == torch.float32 else torch.empty(wide.shape)
        chunks = -(-wide.shape[1] // CHUNK)
        _convolve(
            batch * chunks,
            *(chunks, wide.shape[1], channels, taps, silu),
            *(out.data_ptr(), *out.stride()[:2]),
            *(wide.data_ptr(), *wide.stride()[:2]),
            *(before.data_ptr(), *before.stride()[:2]),
            *(weight.data_ptr(), bias.data_ptr()),
        )
        if out is not y:
            y[:, start : start + step] = out
        state = torch.cat([state, part[:, -taps:]], dim=1)[:, -taps:]
    return y, state.transpose(1, 2).contiguous()


def _one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Decoding: what counts is the cost of the call itself."""
    rows, _, channels = x.shape
    wide, old = x.float(), initial_state.float().contiguous()
    weight = weight.contiguous()
    y, new = torch.empty(rows, 1, channels), torch.empty(old.shape)
    _one_step(
        rows,
        *(channels, weight.shape[1], silu),
        *(y.data_ptr(), new.data_ptr()),
        *(wide.data_ptr(), wide.stride(0), old.data_ptr()),
        *(weight.data_ptr(), 0 if bias is None else bias.data_ptr()),
    )
    return y.to(x.dtype), new.to(x.dtype)
