"""Depthwise causal convolution in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def causal_conv1d(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
    initial_state: Float[Tensor, "sequences channels kernel"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "sequences channels kernel"]]:
    """y_t = act(bias + Σ_k weight[:, k] · x_{t-K+1+k}), with the state of the tokens before x.

    Args:
        x: inputs, any floating dtype.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.
        initial_state: the last K inputs before x (as transformers caches them), or None for zeros.
        cu_seqlens: as in `widefield.ops.causal_conv1d`.

    Returns:
        y in the dtype of x, and the last K inputs (B, D, K), the initial state included, in the
        dtype of x.
    """
    if cu_seqlens is not None:
        return by_sequence(causal_conv1d, x, weight, bias, silu, initial_state, cu_seqlens)
    kernel = weight.shape[1]
    if initial_state is None:
        before = x.new_zeros(x.shape[0], kernel, x.shape[2])
    else:
        before = initial_state.to(x.dtype).transpose(1, 2)
    padded = torch.cat([before, x], dim=1)
    wide = padded[:, 1:].transpose(1, 2)
    y = F.conv1d(
        wide,
        weight[:, None].to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        groups=weight.shape[0],
    )
    if silu:
        y = F.silu(y)
    return y.transpose(1, 2), padded[:, -kernel:].transpose(1, 2).contiguous()


def by_sequence(
    convolve: Callable[..., tuple[Tensor, Tensor]],
    x: Float[Tensor, "1 length channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None,
    silu: bool,
    initial_state: Float[Tensor, "sequences channels kernel"] | None,
    cu_seqlens: Int[Tensor, " bounds"],
) -> tuple[Float[Tensor, "1 length channels"], Float[Tensor, "sequences channels kernel"]]:
    """One sequence of a packed row after the other, with an implementation that knows one only."""
    bounds = cu_seqlens.tolist()
    last = last_of_each(x, weight.shape[1], initial_state, cu_seqlens)
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            state = None if initial_state is None else initial_state[number : number + 1]
            part = x[:, start:stop]
            parts.append(convolve(part, weight, bias, silu=silu, initial_state=state)[0])
    return torch.cat(parts, dim=1) if parts else torch.empty_like(x), last


def last_of_each(
    x: Float[Tensor, "1 length channels"],
    kernel: int,
    initial_state: Float[Tensor, "sequences channels kernel"] | None,
    cu_seqlens: Int[Tensor, " bounds"],
) -> Float[Tensor, "sequences channels kernel"]:
    """The last K inputs of every sequence of a packed row; waits for no GPU."""
    start, stop = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    place = stop - kernel + torch.arange(kernel, device=x.device)  # (S, K)
    inside = place >= start
    read = x[0].index_select(0, place.clamp(min=0).flatten()).unflatten(0, place.shape)
    before = torch.zeros_like(read)
    if initial_state is not None:
        earlier = (place - start + kernel).clamp(max=kernel - 1)[:, None]
        earlier = earlier.expand(-1, initial_state.shape[1], -1)
        before = initial_state.to(x.dtype).gather(2, earlier).transpose(1, 2)
    return torch.where(inside[..., None], read, before).transpose(1, 2).contiguous()
