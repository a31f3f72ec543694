"""A linear projection of one token a row in plain torch, with what stands before and behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from widefield.ops.state_update.reference import causal_conv1d_update


@dataclass(frozen=True, slots=True)
class Convolution:
    """A short convolution with silu that a part of a projection's outputs goes through.

    Attributes:
        state: (B, D, K) the last K inputs, updated in place.
        weight: (D, K) one filter a channel.
        bias: (D,) or None.
        first: which output is channel 0.
    """

    state: Float[Tensor, "batch channels kernel"]
    weight: Float[Tensor, "channels kernel"]
    bias: Float[Tensor, " channels"] | None
    first: int = 0


def project(
    x: Float[Tensor, "batch features"],
    weight: Float[Tensor, "out features"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    gate: Float[Tensor, "batch features"] | None = None,
    norm: Float[Tensor, " features"] | None = None,
    eps: float = 0.0,
    convolution: Convolution | None = None,
    residual: Float[Tensor, "batch out"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch out"]:
    """Weight · norm(x · silu(gate)) + bias + residual, one token a row.

    Args:
        x: inputs.
        weight: of the projection.
        bias: of the projection, or None.
        gate: before its silu, or None.
        norm: weight of a root-mean-square norm over the features, or None for no norm.
        eps: of the norm.
        convolution: what some of the outputs go through, or None.
        residual: added at the end, or None.
        dtype: of the result; None for that of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide)
    if gate is not None:
        value = value * F.silu(gate.to(wide))
    if norm is not None:
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * norm.to(wide)
    value = value.to(weight.dtype).to(wide)  # as modules of that dtype hand it on
    y = F.linear(value, weight.to(wide), None if bias is None else bias.to(wide))
    if convolution is not None:
        part = slice(convolution.first, convolution.first + convolution.state.shape[1])
        y[:, part] = causal_conv1d_update(
            convolution.state, y[:, part], convolution.weight, convolution.bias
        )
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype if dtype is None else dtype)
