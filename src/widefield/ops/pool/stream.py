"""Decimation of a sequence that comes in pieces: the same tokens as in one piece, little memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from widefield.ops.pool.reference import Rows, all_finite, best, refuse_unless, select_rows
from widefield.plan import Pool


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some tokens of every row, in order, with all that belongs to them.

    Attributes:
        score: (B, n).
        position: (B, n) in the whole sequence.
        valid: (B, n), or None if no token is padding.
        tokens: tensors (B, n, ...).
    """

    score: Float[Tensor, "batch length"]
    position: Int[Tensor, "batch length"]
    valid: Bool[Tensor, "batch length"] | None
    tokens: dict[str, Tensor]

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        """What belongs to the tokens of these rows."""
        return {name: rows.gather(tensor) for name, tensor in self.tokens.items()}


class Survivors:
    """Keeps the tokens that a pool keeps of a sequence, while the sequence is still coming.

    What may still be kept is the best `keep` tokens so far and the last `protect`: whatever follows
    can only push tokens out, so that the choice at the end is that of the whole sequence. Memory is
    that of about twice as many tokens and one piece.
    """

    def __init__(self, pool: Pool) -> None:
        """Start with no token."""
        self._pool = pool
        self._candidates = pool.keep + pool.protect
        self._pieces: list[_Piece] = []
        self._length = 0
        self._finite: Tensor | None = None

    def add(
        self,
        score: Float[Tensor, "batch length"],
        valid: Bool[Tensor, "batch length"] | None,
        tokens: dict[str, Tensor],
    ) -> None:
        """Take the next tokens of every row.

        Args:
            score: importance of each token; higher is better.
            valid: False marks padding (on the left of the sequence); None = all valid.
            tokens: by name, tensors (B, n, ...) of what belongs to each token; the same names every
                time.

        Raises:
            WidefieldError: if a valid token's score is not finite; on a GPU, which would have to be
                waited for, `thin` or `take` says so.
        """
        finite = all_finite(score, valid)
        self._finite = finite if self._finite is None else self._finite & finite
        if score.is_cpu:
            self._check()
        if sum(piece.score.shape[1] for piece in self._pieces) > 2 * self._candidates:
            self._pieces = [self._best_of(self._merged())]
        batch, length = score.shape
        position = torch.arange(self._length, self._length + length, device=score.device)
        self._length += length
        piece = _Piece(score, position.expand(batch, -1), valid, tokens)
        # A long piece is thinned by itself, so that no more than its best tokens are copied.
        self._pieces.append(self._best_of(piece) if length > 2 * self._candidates else piece)

    def take(self) -> tuple[Rows, dict[str, Tensor]]:
        """The kept rows of the whole sequence, and what belongs to them (B, k, ...).

        Raises:
            WidefieldError: if a valid token's score is not finite.
        """
        self._check()
        piece = self._merged()
        rows = select_rows(piece.score, self._pool, piece.valid)
        position = torch.gather(piece.position, 1, rows.index)
        return Rows(position, rows.valid), piece.gather(rows)

    def thin(self) -> None:
        """Drop every token that cannot be kept any more, and copy the others.

        Until then the tensors given to `add` are looked into and cannot be freed.

        Raises:
            WidefieldError: if a valid token's score is not finite.
        """
        self._check()
        self._pieces = [self._best_of(self._merged())]

    def _check(self) -> None:
        if self._finite is not None:
            finite, self._finite = self._finite, None
            refuse_unless(finite)

    def _best_of(self, piece: _Piece) -> _Piece:
        """The tokens of a piece that may still be kept, copied."""
        index = best(piece.score, self._pool.protect, piece.valid, self._candidates)
        valid = None if piece.valid is None else torch.gather(piece.valid, 1, index)
        return _Piece(
            torch.gather(piece.score, 1, index),
            torch.gather(piece.position, 1, index),
            valid,
            piece.gather(Rows(index, None)),
        )

    def _merged(self) -> _Piece:
        """All pieces as one."""
        pieces = self._pieces
        if len(pieces) == 1:
            return pieces[0]
        valid = None
        if any(piece.valid is not None for piece in pieces):
            valid = torch.cat([_valid(piece) for piece in pieces], dim=1)
        return _Piece(
            torch.cat([piece.score for piece in pieces], dim=1),
            torch.cat([piece.position for piece in pieces], dim=1),
            valid,
            {name: torch.cat([p.tokens[name] for p in pieces], dim=1) for name in pieces[0].tokens},
        )


def _valid(piece: _Piece) -> Bool[Tensor, "batch length"]:
    if piece.valid is not None:
        return piece.valid
    return torch.ones_like(piece.position, dtype=torch.bool)
