"""Sequence decimation (DeciMamba): score tokens, keep the best in order, gather."""

from __future__ import annotations

from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.pool import reference
from widefield.ops.pool.reference import Rows
from widefield.plan import Pool, ScanInputs, SSDInputs

__all__ = ["Rows", "pool_tokens", "token_score"]

Inputs = TypeVar("Inputs", ScanInputs, SSDInputs)


def token_score(inputs: ScanInputs | SSDInputs, pool: Pool) -> Float[Tensor, "batch length"]:
    """How important each token is: ‖w ⊙ min(Δ_t, c)‖₂ over channels, float32.

    Args:
        inputs: the scan's inputs.
        pool: the clamp c and the weights w.
    """
    if isinstance(inputs, ScanInputs) and choose(inputs.x, inputs.delta) == "cpu":
        from widefield.ops.pool import cpu

        return cpu.token_score(inputs, pool)
    return reference.token_score(inputs, pool)


def pool_tokens(inputs: Inputs, pool: Pool) -> tuple[Inputs, Rows]:
    """Keep the best tokens of one layer's scan inputs.

    Args:
        inputs: the scan's inputs over the full sequence of this layer.
        pool: how many tokens, and how they are scored.

    Returns:
        The inputs over the kept tokens, and the rows that were kept, with which the caller gathers
        the
        residual stream.

    Raises:
        WidefieldError: if a valid token's score is not finite.
    """
    rows = reference.select_rows(token_score(inputs, pool), pool, inputs.valid)
    names = ["x", "delta", "B", "C"]
    if isinstance(inputs, ScanInputs) and inputs.z is not None:
        names.append("z")
    kept = {name: rows.gather(getattr(inputs, name)) for name in names}
    return inputs.replace(**kept, valid=rows.valid), rows
