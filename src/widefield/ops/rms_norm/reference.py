"""RMS norms in plain torch: sums in float32 (float64 where x is)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"] | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch width"]:
    """RMS norm: weight · x / √(mean(x²) + eps); see `widefield.ops.rms_norm`."""
    y = _normed(_wide(x), eps).to(x.dtype)
    y = y if weight is None else weight * y
    return y if dtype is None else y.to(dtype)


def add_rms_norm(
    x: Float[Tensor, "*batch width"],
    other: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    eps: float,
    *,
    scale: Float[Tensor, "*batch"] | None = None,
    sum_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch width"]]:
    """A sum and its norm; see `widefield.ops.add_rms_norm`."""
    if scale is not None:
        other = (other * scale[..., None]).to(other.dtype)
    added = (x if sum_dtype is None else x.to(sum_dtype)) + other
    added = added if sum_dtype is None else added.to(sum_dtype)
    return added, rms_norm(added, weight, eps, dtype=dtype)


def gated_rms_norm(
    x: Float[Tensor, "*batch width"],
    gate: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    eps: float,
    *,
    groups: int = 1,
    gate_first: bool = True,
) -> Float[Tensor, "*batch width"]:
    """The gated norm; see `widefield.ops.gated_rms_norm`."""
    wide, opening = _wide(x), F.silu(_wide(gate))
    if gate_first:
        wide = wide * opening
    wide = _normed(wide.unflatten(-1, (groups, -1)), eps).flatten(-2)
    if gate_first:
        return weight * wide.to(x.dtype)
    return (weight * wide * opening).to(torch.promote_types(x.dtype, weight.dtype))


def inverse_rms(
    squares: Float[Tensor, "*batch parts"], width: int, eps: float
) -> Float[Tensor, "*batch"]:
    """1 / √(mean square + eps); see `widefield.ops.inverse_rms`."""
    return torch.rsqrt(squares.sum(-1) / width + eps)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
