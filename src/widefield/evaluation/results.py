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

__all__ = ["FORMAT", "Cell", "Results", "differences", "results_file", "write_atomically"]

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
        bits: mean -log2 p a byte over the scored tokens; None for passkey.
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

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a stored file.

        Args:
            path: results.json, or the folder that holds it.

        Raises:
            WidefieldError: if there is none or it is damaged; the file is left as it is.
        """
        path = results_file(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            header, cells = data["header"], [Cell(**cell) for cell in data["cells"]]
            if header["format"] != FORMAT:
                raise WidefieldError(
                    f"{path} has results format {header['format']}, this widefield reads {FORMAT}; "
                    "choose another --out"
                )
        except FileNotFoundError as error:
            raise WidefieldError(f"no results at {path}") from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, WidefieldError):
                raise
            raise WidefieldError(
                f"{path} is not a readable results file ({type(error).__name__}); it was left as "
                "it is: move it away or choose another --out"
            ) from error
        return cls(header, cells, path, resumed=len(cells))

    @classmethod
    def open(cls, path: str | Path | None, header: dict[str, Any]) -> Results:
        """Go on with a stored file of the same run, or begin a new one.

        Nothing is written before the first cell. Subjects and tasks that only one of the two
        headers has are kept side by side.

        Args:
            path: results.json, or the folder that holds it or will; None keeps all in memory.
            header: of the run that begins; see `make_header` in evaluation/header.py.

        Raises:
            WidefieldError: if the file belongs to a run of another configuration, or is damaged.
        """
        if path is None:
            return cls(header)
        file = results_file(path)
        if not file.exists():
            return cls(header, [], file)
        stored = cls.load(file)
        differing = differences(stored.header, header)
        if differing:
            raise WidefieldError(
                f"{file} belongs to another run ({'; '.join(differing)}); "
                "choose another --out, run it as before to go on with it, "
                "or start over with --fresh"
            )
        stored.header = _merge(stored.header, header)
        return stored

    def add(self, cell: Cell) -> None:
        """Keep a finished cell and, if the results have a path, write the file."""
        self.cells.append(cell)
        self.save()

    def save(self) -> None:
        """Write the file, atomically; nothing happens without a path."""
        if self.path is None:
            return
        data = {"header": self.header, "cells": [asdict(cell) for cell in self.cells]}
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        write_atomically(self.path, text.encode())

    def find(self, task: str, method: str, length: int, depth: float | None = None) -> Cell | None:
        """The cell of that description, or None if it is not finished."""
        key = (task, method, length, depth)
        return next((cell for cell in self.cells if cell.key == key), None)

    def select(self, task: str, method: str | None = None) -> list[Cell]:
        """The cells of a task (and a method), in order of method, length, depth."""
        names = self.methods(task)
        chosen = [c for c in self.cells if c.task == task and method in (None, c.method)]
        return sorted(chosen, key=lambda c: (names.index(c.method), c.length, c.depth or 0.0))

    def methods(self, task: str) -> list[str]:
        """Names of the subjects with cells of a task, in the order of their first cells."""
        return list(dict.fromkeys(cell.method for cell in self.cells if cell.task == task))

    def share(self, task: str, method: str, length: int) -> float:
        """Share of right answers at a length over all depths; NaN if there are none."""
        cells = [c for c in self.select(task, method) if c.length == length]
        trials = sum(c.trials for c in cells)
        return sum(c.correct or 0 for c in cells) / trials if trials else float("nan")


def results_file(path: str | Path) -> Path:
    """`path` itself if it is a .json file, else results.json inside that folder."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "results.json"


def differences(stored: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps two headers from being the same run, in words; `command` may differ."""
    found: list[str] = []
    for key in stored.keys() | new.keys():
        if key in _SIDE_BY_SIDE:
            old, now = stored.get(key, {}), new.get(key, {})
            for name in sorted(old.keys() & now.keys()):
                found += _leaves(f"{key}.{name}", old[name], now[name])
        elif key != "command":
            found += _leaves(key, stored.get(key), new.get(key))
    return sorted(found)


_SIDE_BY_SIDE = ("subjects", "tasks")


def _leaves(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _leaves(f"{name}.{k}", old.get(k), new.get(k))]
    return [] if old == new else [f"{name} was {old!r}, is {new!r}"]


def _merge(stored: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    side_by_side = {key: {**stored.get(key, {}), **new.get(key, {})} for key in _SIDE_BY_SIDE}
    return {**stored, **new, **side_by_side}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it; the folder is made if need be.

    Raises:
        WidefieldError: if the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise WidefieldError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise WidefieldError(f"cannot write {path}: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
