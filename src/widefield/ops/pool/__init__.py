"""Sequence decimation (DeciMamba): score tokens, keep the best in order, gather."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.pool import reference
from widefield.ops.pool.reference import Rows
from widefield.ops.pool.stream import Survivors
from widefield.plan import Pool, ScanInputs

__all__ = ["Rows", "Survivors", "pool_tokens", "token_score"]


def token_score(inputs: ScanInputs, pool: Pool) -> Float[Tensor, "batch length"]:
    """How important each token is: ‖w ⊙ min(Δ_t, c)‖₂ over channels, float32.

    Args:
        inputs: the scan's inputs.
        pool: the clamp c and the weights w.
    """
    if choose(inputs.x, inputs.delta) == "cpu":
        from widefield.ops.pool import cpu

        return cpu.token_score(inputs, pool)
    return reference.token_score(inputs, pool)


def pool_tokens(inputs: ScanInputs, pool: Pool) -> tuple[ScanInputs, Rows]:
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
    kept = inputs.replace(
        x=rows.gather(inputs.x),
        delta=rows.gather(inputs.delta),
        B=rows.gather(inputs.B),
        C=rows.gather(inputs.C),
        z=None if inputs.z is None else rows.gather(inputs.z),
        valid=rows.valid,
    )
    return kept, rows
