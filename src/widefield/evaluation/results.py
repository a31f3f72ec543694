"""One store of results: a header that says how they were made, and one record a cell.

The file is written anew, atomically, after every cell, so an interrupted run loses nothing that it
finished, and the same run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from widefield.errors import WidefieldError

__all__ = ["FORMAT", "Cell", "Results", "write_atomically"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured cell.

    Attributes:
        task: "passkey" or "bits".
        method: name of the subject, e.g. "unmodified".
        length: context length in tokens.
        depth: where the needle lay, 0 to 1; None for bits.
        trials: prompts (passkey) or windows (bits).
        correct: how many answers were right; None for bits.
        seconds: this cell's share of the wall time of its batches.
        bits: mean −log2 p a byte over the scored tokens; None for passkey.
        bits_per_token: the same a token; None for passkey.
        tokens: scored tokens; None for passkey.
    """

    task: str
    method: str
    length: int
    depth: float | None
    trials: int
    correct: int | None
    seconds: float
    bits: float | None = None
    bits_per_token: float | None = None
    tokens: int | None = None

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1; NaN for bits."""
        return float("nan") if self.correct is None else self.correct / self.trials

    @property
    def key(self) -> tuple[str, str, int, float | None]:
        """What a cell is about: task, method, length, depth."""
        return self.task, self.method, self.length, self.depth


@dataclass
class Results:
    """A header and cells.

    Attributes:
        header: JSON-able facts of the run.
        cells: in the order in which they were finished.
        path: where they are stored, or None for memory only.
        resumed: how many cells were found finished when the run began.
    """

    header: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    path: Path | None = None
    resumed: int = 0
