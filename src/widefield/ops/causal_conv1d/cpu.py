"""The causal convolution on the CPU: channels-last as it comes, with the silu fused."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._numba import (
    BYTES,
    WIDTH,
    fma,
    in_parallel,
    kernel,
    load_number,
    load_some,
    store_number,
    store_some,
)
from widefield.ops._numba import silu as silu_of

CHUNK = 256  # tokens of one task


@kernel
def _convolve(
    y, y_stride, x, x_stride, before, weight, bias, start, stop, channels, taps, apply_silu
):
    """Tokens start to stop of a row; `before` holds the taps - 1 tokens before its first, dense."""
    for t in range(start, stop):
        for block in range(0, channels, WIDTH):
            count = channels - block
            total = load_some(bias + block * BYTES, count)
            for k in range(taps):
                source = t - taps + 1 + k
                if source >= 0:
                    here = x + (source * x_stride + block) * BYTES
                else:
                    here = before + ((source + taps - 1) * channels + block) * BYTES
                tap = load_some(weight + (k * channels + block) * BYTES, count)
                total = fma(tap, load_some(here, count), total)
            if apply_silu:
                total = silu_of(total)
            store_some(y + (t * y_stride + block) * BYTES, total, count)


@kernel
def _step(y, new, x, x_stride, old, weight, bias, rows, channels, taps, apply_silu):
    """One token of every row; the state (B, D, K) goes from `old` to `new`. Bias 0: None."""
    for row in range(rows):
        for d in range(channels):
            at = (row * channels + d) * taps * BYTES
            for k in range(taps - 1):
                store_number(new + at + k * BYTES, load_number(old + at + (k + 1) * BYTES))
            last = new + at + (taps - 1) * BYTES
            store_number(last, load_number(x + (row * x_stride + d) * BYTES))
            total = 0.0
            if bias != 0:
                total += load_number(bias + d * BYTES)
            for k in range(taps):
                here = at + k * BYTES
                total += load_number(weight + d * taps * BYTES + k * BYTES) * load_number(
                    new + here
                )
            store_number(y + (row * channels + d) * BYTES, total)
    if apply_silu:
        for i in range(0, rows * channels, WIDTH):
            count, here = rows * channels - i, y + i * BYTES
            store_some(here, silu_of(load_some(here, count)), count)


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
        if x.stride(-1) != 1:
            x = x.contiguous()
        if x.shape[1] == 1 and initial_state is not None:
            return _one_token(x, weight, bias, silu, initial_state)
        call = _Convolution(x, weight, bias, silu, initial_state)
        in_parallel(
            call.run, [(row, t) for row in range(len(x)) for t in range(0, x.shape[1], CHUNK)]
        )
        return call.y, _last_inputs(x, weight.shape[1], initial_state)


class _Convolution:
    """One call: its tensors as the kernel reads them, and the result that it fills."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_state: Tensor | None,
    ) -> None:
        batch, _, channels = x.shape
        self.x, self.silu = x, silu
        self.weight = weight.to(x.dtype).float().t().contiguous()
        self.bias = self.weight.new_zeros(channels)
        if bias is not None:
            self.bias = bias.to(x.dtype).float().contiguous()
        if initial_state is None:
            self.before = self.weight.new_zeros(batch, len(self.weight) - 1, channels)
        else:
            self.before = initial_state[..., 1:].to(x.dtype).float().transpose(1, 2).contiguous()
        self.y = torch.empty(x.shape, dtype=x.dtype)

    def run(self, task: tuple[int, int]) -> None:
        """Convolve one chunk of tokens of one row."""
        row, start = task
        taps, channels = self.weight.shape
        stop = min(start + CHUNK, self.x.shape[1])
        first = max(0, start - taps + 1)
        wide = self.x[row, first:stop].float()
        y = self.y[row, start:stop]
        out = y if y.dtype == torch.float32 else torch.empty(y.shape)
        _convolve(
            out.data_ptr() - start * channels * BYTES,
            channels,
            wide.data_ptr() - first * wide.stride(0) * BYTES,
            wide.stride(0),
            self.before.data_ptr() + row * self.before.stride(0) * BYTES,
            self.weight.data_ptr(),
            self.bias.data_ptr(),
            start,
            stop,
            channels,
            taps,
            self.silu,
        )
        if out is not y:
            y.copy_(out)


def _one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Decoding: the call's own cost is what counts."""
    rows, _, channels = x.shape
    wide, old = x.float(), initial_state.float().contiguous()
    taps = weight.to(x.dtype).float().contiguous()
    shift = None if bias is None else bias.to(x.dtype).float().contiguous()
    y, new = torch.empty(rows, 1, channels), torch.empty(old.shape)
    _step(
        y.data_ptr(),
        new.data_ptr(),
        wide.data_ptr(),
        wide.stride(0),
        old.data_ptr(),
        taps.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        rows,
        channels,
        taps.shape[1],
        silu,
    )
    return y.to(x.dtype), new.to(x.dtype)


def _last_inputs(
    x: Float[Tensor, "batch length channels"],
    kernel: int,
    initial_state: Float[Tensor, "batch channels kernel"] | None,
) -> Float[Tensor, "batch channels kernel"]:
    tail = x[:, -kernel:].transpose(1, 2)
    missing = kernel - tail.shape[2]
    if missing == 0:
        return tail.contiguous()
    if initial_state is None:
        before = x.new_zeros(x.shape[0], x.shape[2], missing)
    else:
        before = initial_state[..., -missing:].to(x.dtype)
    return torch.cat([before, tail], dim=2)
