"""A linear projection of one token a row, with what stands before and behind it in a block."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.project import reference
from widefield.ops.project.reference import Convolution

__all__ = ["Convolution", "project", "projects_fast"]

_MOST_ROWS = 3  # with more, products of matrices are faster, each a kernel of its own
_MOST_FEATURES = 16384


def projects_fast(weight: Tensor, rows: int, features: int) -> bool:
    """Whether `project` has a kernel for a batch of inputs; it pays for very few rows only.

    Args:
        weight: of the projection, or of any other on the same device in the same dtype.
        rows: of the batch.
        features: of an input.
    """
    fits = rows <= _MOST_ROWS and features <= _MOST_FEATURES
    return fits and not torch.is_grad_enabled() and choose(weight) == "cuda"


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
    """Weight · norm(x · silu(gate)) + bias + residual, one token a row; sums are float32.

    Args:
        x: inputs.
        weight: of the projection.
        bias: of the projection, or None.
        gate: before its silu, or None.
        norm: weight of a root-mean-square norm over the features, or None for no norm.
        eps: of the norm.
        convolution: a short convolution that some of the outputs go through, its state one token
            on, in place; or None.
        residual: added at the end, or None.
        dtype: of the result; None for that of x.

    Returns:
        (B, out) in `dtype`.
    """
    run = reference.project
    if projects_fast(weight, *x.shape):
        from widefield.ops.project import cuda

        run = cuda.project
    return run(
        *(x, weight, bias),
        gate=gate,
        norm=norm,
        eps=eps,
        convolution=convolution,
        residual=residual,
        dtype=dtype,
    )
