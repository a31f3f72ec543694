"""One decode step of both generations of Mamba in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def causal_conv1d_update(
    state: Float[Tensor, "batch channels kernel"],
    x: Float[Tensor, "batch channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
) -> Float[Tensor, "batch channels"]:
    """Push one more input into `state`, in place, and return the convolution's y there, as x is.

    Args:
        state: the last K inputs, updated in place.
        x: the input that comes in.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    new = torch.cat([state[:, :, 1:], x[:, :, None].to(state.dtype)], dim=2)
    state.copy_(new)
    y = (new.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def selective_state_update(
    state: Float[Tensor, "batch channels state"],
    x: Float[Tensor, "batch channels"],
    delta: Float[Tensor, "batch channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state"],
    C: Float[Tensor, "batch *groups state"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
    *,
    delta_softplus: bool = True,
) -> Float[Tensor, "batch channels"]:
    """Advance `state` by one token, in place, and return that token's y in the dtype of x.

    Args:
        state: updated in place; float32 keeps long decodes exact.
        x: what is written into the state.
        delta: raw Δ before bias and softplus.
        A: negative decay rates.
        B: input projection of the token; with groups, the channels are that many equal parts.
        C: output projection of the token, like B.
        D: skip connection, or None.
        z: gate before its silu, or None.
        delta_bias: added to `delta`, or None.
        delta_softplus: whether Δ = softplus(delta + bias).
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    decay = torch.exp(step[..., None] * A.to(dtype))
    written = (step * x.to(dtype))[..., None]
    new = decay * state.to(dtype) + written * _per_channel(B.to(dtype), x.shape[1])
    state.copy_(new)
    y = (new * _per_channel(C.to(dtype), x.shape[1])).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def low_rank_state_update(
    state: Float[Tensor, "batch channels state"],
    x: Float[Tensor, "batch channels"],
    low_rank: Float[Tensor, "batch rank"],
    delta_weight: Float[Tensor, "channels rank"],
    A_log: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state"],
    C: Float[Tensor, "batch *groups state"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels"]:
    """The same from Δ's low rank and the logarithms of the rates, as a model has them.

    Args:
        state: updated in place.
        x: what is written into the state.
        low_rank: what Δ is projected from.
        delta_weight: raw Δ is this times `low_rank`.
        A_log: log(-A).
        B: input projection of the token.
        C: output projection of the token.
        D: skip connection, or None.
        z: gate before its silu, or None.
        delta_bias: added to Δ in front of its softplus, or None.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = F.linear(low_rank.to(wide), delta_weight.to(wide))
    A = -torch.exp(A_log.to(wide))
    return selective_state_update(state, x, delta, A, B, C, D, z, delta_bias)


def ssd_state_update(
    state: Float[Tensor, "batch heads width state"],
    x: Float[Tensor, "batch heads width"],
    delta: Float[Tensor, "batch heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch groups state"],
    C: Float[Tensor, "batch groups state"],
    D: Float[Tensor, " heads"] | None = None,
    delta_bias: Float[Tensor, " heads"] | None = None,
    *,
    delta_softplus: bool = True,
    delta_limit: tuple[float, float] = (0.0, math.inf),
    log_rates: bool = False,
) -> Float[Tensor, "batch heads width"]:
    """Advance `state` of Mamba-2 by one token, in place, and return that token's y, as x is.

    Args:
        state: updated in place; float32 keeps long decodes exact.
        x: what is written into the state.
        delta: raw Δ before bias and softplus.
        A: negative decay rates.
        B: input projection of the token, one per group of heads.
        C: output projection of the token, one per group of heads.
        D: skip connection, or None.
        delta_bias: added to `delta`, or None.
        delta_softplus: whether Δ = softplus(delta + bias).
        delta_limit: smallest and largest Δ that the model allows.
        log_rates: whether A holds log(-A).
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    A = -torch.exp(A.to(dtype)) if log_rates else A
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    if delta_limit != (0.0, math.inf):
        step = torch.clamp(step, *delta_limit)
    share = x.shape[1] // B.shape[1]
    B, C = (t.to(dtype).repeat_interleave(share, dim=1)[:, :, None] for t in (B, C))
    decay = torch.exp(step * A.to(dtype))[..., None, None]
    new = decay * state.to(dtype) + (step[..., None] * x.to(dtype))[..., None] * B
    state.copy_(new)
    y = (new * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x.to(dtype)
    return y.to(x.dtype)


def _per_channel(values: Tensor, channels: int) -> Tensor:
    """(B, N) or (B, G, N) made to broadcast against (B, D, N)."""
    if values.ndim == 2:
        return values[:, None]
    return values.repeat_interleave(channels // values.shape[1], dim=1)
