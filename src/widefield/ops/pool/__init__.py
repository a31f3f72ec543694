"""Sequence decimation (DeciMamba): score tokens, keep the best in order, gather."""

from __future__ import annotations

import math
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose, runs_kernels
from widefield.ops.pool import reference
from widefield.ops.pool.reference import Rows
from widefield.ops.pool.stream import Survivors
from widefield.plan import Pool, ScanInputs, SSDInputs

__all__ = ["Rows", "Survivors", "pool_tokens", "token_score"]
Inputs = TypeVar("Inputs", ScanInputs, SSDInputs)
_SEQUENCES = ("x", "delta", "B", "C", "z")


def token_score(inputs: ScanInputs | SSDInputs, pool: Pool) -> Float[Tensor, "batch length"]:
    """How important each token is: ‖w ⊙ min(Δ_t, c)‖₂ over channels (or heads), float32.

    Args:
        inputs: the inputs of a scan of either generation.
        pool: the clamp c and the weights w.
    """
    if runs_kernels(inputs.delta):
        from widefield.ops.pool import cuda

        return cuda.token_score(inputs, pool)
    limited = isinstance(inputs, SSDInputs) and inputs.delta_limit != (0.0, math.inf)
    if choose(inputs.x, inputs.delta) == "cpu" and not limited:
        from widefield.ops.pool import cpu

        return cpu.token_score(inputs, pool)
    return reference.token_score(inputs, pool)


def pool_tokens(inputs: Inputs, pool: Pool) -> tuple[Inputs, Rows]:
    """Keep the best tokens of one layer's scan inputs.

    Args:
        inputs: the inputs of a scan of either generation, over the full sequence of this layer.
        pool: how many tokens, and how they are scored.

    Returns:
        The inputs over the kept tokens, and the rows that were kept, with which the caller gathers
        the residual stream.

    Raises:
        WidefieldError: if a valid token's score is not finite.
    """
    rows = reference.select_rows(token_score(inputs, pool), pool, inputs.valid)
    sequences = {name: getattr(inputs, name, None) for name in _SEQUENCES}
    kept = {name: rows.gather(t) for name, t in sequences.items() if t is not None}
    return inputs.replace(**kept, valid=rows.valid), rows
