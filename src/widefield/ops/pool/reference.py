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
        index = self.index.reshape(*self.index.shape, *(1 for _ in sequence.shape[2:]))
        return torch.gather(sequence, 1, index.expand(-1, -1, *sequence.shape[2:]))


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
    length = score.shape[1]
    score = score.detach()
    finite = torch.isfinite(score) if valid is None else torch.isfinite(score) | ~valid
    if not bool(finite.all()):
        raise WidefieldError(
            "non-finite Δ: a token's importance score is NaN or infinite; "
            "check the model's weights and its dtype (float32 is safest)"
        )
    score = score.clone()
    score[:, length - min(pool.protect, length) :] = torch.inf
    if valid is not None:
        score = score.masked_fill(~valid, -torch.inf)
    most = length if valid is None else int(valid.sum(1).max())
    keep = max(1, min(pool.keep, most))
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :keep]
    index = order.sort(dim=1).values
    if valid is None:
        return Rows(index, None)
    kept = torch.gather(valid, 1, index)
    return Rows(index, None if bool(kept.all()) else kept)
