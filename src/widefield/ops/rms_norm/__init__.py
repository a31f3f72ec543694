"""RMS norm, and the gated one of Mamba-2: one signature, two implementations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import on_gpu, runs_kernels
from widefield.ops.rms_norm import reference

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]


def rms_norm(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"] | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch width"]:
    """RMS norm: weight · x / √(mean(x²) + eps), the mean over the last dimension.

    Args:
        x: any floating dtype, any strides.
        weight: any floating dtype; None for 1.
        eps: added to the mean square.
        dtype: of the result; None for the wider of those of x and weight.

    Returns:
        Of the shape of x.
    """
    if runs_kernels(x, weight):
        return on_gpu("rms_norm").rms_norm(x, weight, eps, dtype=dtype)
    return reference.rms_norm(x, weight, eps, dtype=dtype)


def add_rms_norm(
    x: Float[Tensor, "*batch width"],
    other: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    eps: float,
    *,
    sum_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, "*batch width"]]:
    """The sum of x and other, and the RMS norm of that sum.

    Args:
        x: any floating dtype, any strides.
        other: of the shape of x.
        weight: any floating dtype.
        eps: added to the mean square.
        sum_dtype: of the sum; None for the wider of those of x and other.
        dtype: of its norm; None for the wider of those of the sum and the weight.
    """
    call = {"sum_dtype": sum_dtype, "dtype": dtype}
    if runs_kernels(x, other, weight):
        return on_gpu("rms_norm").add_rms_norm(x, other, weight, eps, **call)
    return reference.add_rms_norm(x, other, weight, eps, **call)


def gated_rms_norm(
    x: Float[Tensor, "*batch width"],
    gate: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    eps: float,
    *,
    groups: int = 1,
    gate_first: bool = True,
) -> Float[Tensor, "*batch width"]:
    """The norm of x · silu(gate), or the norm of x times silu(gate).

    Args:
        x: any floating dtype, any strides.
        gate: of the shape of x; before its silu.
        weight: any floating dtype.
        eps: added to the mean square.
        groups: equal parts of the last dimension, each with a mean of its own.
        gate_first: whether the gate comes before the norm.

    Returns:
        In the wider of the dtypes of x and weight.
    """
    if runs_kernels(x, gate, weight):
        run = on_gpu("rms_norm").gated_rms_norm
    else:
        run = reference.gated_rms_norm
    return run(x, gate, weight, eps, groups=groups, gate_first=gate_first)
