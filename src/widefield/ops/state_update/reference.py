"""One decode step of the selective scan in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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


def _per_channel(values: Tensor, channels: int) -> Tensor:
    """(B, N) or (B, G, N) made to broadcast against (B, D, N)."""
    if values.ndim == 2:
        return values[:, None]
    return values.repeat_interleave(channels // values.shape[1], dim=1)
