"""Sequence decimation in plain torch: score, top-k in order, differentiable gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.ops._delta import effective_delta
from widefield.plan import Pool, ScanInputs, SSDInputs


@dataclass(frozen=True, slots=True)
class Rows:
    """Which tokens of each row are kept.

    Attributes:
        index: (B, k) positions in the incoming sequence, ascending among the kept tokens of a row.
        valid: (B, k) False where a row has fewer than k tokens (on the left), or None if all are
            valid.
    """

    index: Int[Tensor, "batch kept"]
    valid: Bool[Tensor, "batch kept"] | None

    def gather(self, sequence: Float[Tensor, "batch length *features"]) -> Tensor:
        """The kept rows (B, k, …) of a sequence (B, L, …); gradients flow through them."""
        features = sequence.shape[2:]
        index = self.index.view(*self.index.shape, *(1 for _ in features))
        return torch.gather(sequence, 1, index.expand(-1, -1, *features))


def token_score(inputs: ScanInputs | SSDInputs, pool: Pool) -> Float[Tensor, "batch length"]:
    """‖w ⊙ min(Δ_t, c)‖₂ over channels, float32 (float64 if the inputs are)."""
    delta = effective_delta(inputs)
    if pool.clamp is not None:
        delta = torch.minimum(delta, pool.clamp.to(delta.dtype))
    if pool.weight is not None:
        delta = delta * pool.weight.to(delta.dtype)
    return torch.linalg.vector_norm(delta, dim=-1)


def select_rows(
    score: Float[Tensor, "batch length"], pool: Pool, valid: Bool[Tensor, "batch length"] | None
) -> Rows:
    """The min(length, keep) best tokens of every row, in order, the last `protect` too.

    Ties go to the earlier token. Padding (left) is never kept while a row has enough tokens.

    Raises:
        WidefieldError: if the score of a valid token is not finite.
    """
    check_scores(score, valid)
    most = score.shape[1] if valid is None else int(valid.sum(1).max())
    index = best(score, pool.protect, valid, max(1, min(pool.keep, most)))
    if valid is None:
        return Rows(index, None)
    kept = torch.gather(valid, 1, index)
    return Rows(index, None if bool(kept.all()) else kept)


def check_scores(
    score: Float[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None
) -> None:
    """Raise unless every valid token has a finite score.

    Raises:
        WidefieldError: naming the likely causes.
    """
    refuse_unless(all_finite(score, valid))


def all_finite(
    score: Float[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None
) -> Bool[Tensor, ""]:
    """Whether every valid token has a finite score, without waiting for a GPU to know."""
    finite = torch.isfinite(score)
    return (finite if valid is None else finite | ~valid).all()


def refuse_unless(finite: Bool[Tensor, ""]) -> None:
    """Raise unless all scores were finite.

    Raises:
        WidefieldError: naming the likely causes.
    """
    if not bool(finite):
        raise WidefieldError(
            "non-finite Δ: a token's importance score is NaN or infinite; "
            "check the model's weights and its dtype (float32 is safest)"
        )


def best(
    score: Float[Tensor, "batch length"],
    protect: int,
    valid: Bool[Tensor, "batch length"] | None,
    count: int,
) -> Int[Tensor, "batch count"]:
    """Positions of the `count` best tokens of every row, ascending; the last `protect` come first.

    Ties go to the earlier token, and padding comes last.
    """
    length = score.shape[1]
    score = score.detach().clone()
    score[:, length - min(protect, length) :] = torch.inf
    if valid is not None:
        score = score.masked_fill(~valid, -torch.inf)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]
    return order.sort(dim=1).values
