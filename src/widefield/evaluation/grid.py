"""Lengths, depths and methods as people write them: "1k,16k", "0,0.5,1", "unmodified,longmamba"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from widefield.errors import WidefieldError, unknown

__all__ = [
    "DEFAULT_DEPTHS",
    "UNMODIFIED",
    "BitsGrid",
    "PasskeyGrid",
    "check_counts",
    "length_label",
    "parse_depths",
    "parse_length",
    "parse_lengths",
    "parse_methods",
]

UNMODIFIED = "unmodified"
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([km]?)", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class PasskeyGrid:
    """What `run_passkey` asks.

    Attributes:
        lengths: prompt lengths in tokens.
        depths: where the needle lies, 0 to 1.
        trials: prompts a cell.
        seed: draws keys and windows of the haystack.
        batch_tokens: most tokens that one batch may hold; None chooses by the device's memory.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = DEFAULT_DEPTHS
    trials: int = 4
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse a grid without cells."""
        check_counts(self.lengths, trials=self.trials)
        if not self.depths:
            raise WidefieldError("no depths were given; give at least one between 0 and 1")
        for depth in self.depths:
            _check_depth(depth, str(depth))


@dataclass(frozen=True)
class BitsGrid:
    """What `run_bits` asks.

    Attributes:
        lengths: context lengths in tokens.
        windows: windows a length.
        last: how many tokens at the end of each window are scored.
        seed: draws the windows.
        batch_tokens: most tokens that one batch may hold; None chooses by the device's memory.
    """

    lengths: tuple[int, ...]
    windows: int = 8
    last: int = 2048
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse a grid without cells."""
        check_counts(self.lengths, windows=self.windows, last=self.last)


def check_counts(lengths: tuple[int, ...], **counts: int) -> None:
    """Raise `WidefieldError` if there are no lengths, or a named count is below 1."""
    if not lengths:
        raise WidefieldError("no lengths were given; give at least one, e.g. 1k")
    for name, count in counts.items():
        if count < 1:
            raise WidefieldError(f"{name} is {count}; give at least 1")


def parse_length(text: str) -> int:
    """A length in tokens: a number with an optional k (1,024) or m (1,048,576).

    Raises:
        WidefieldError: for anything else.
    """
    match = _LENGTH.fullmatch(text.strip())
    tokens = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if tokens < 1 or tokens != int(tokens):
        raise WidefieldError(
            f"{text.strip()!r} is not a length: give whole tokens such as 512, 16k (k = 1,024) or "
            "1m (m = 1,048,576)"
        )
    return int(tokens)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths in tokens, separated by commas, each once, in the order given: "1k,16k,64k"."""
    return _parse_list(text, parse_length, "lengths", "1k,16k,64k")


def parse_depths(text: str) -> tuple[float, ...]:
    """Depths from 0 to 1, separated by commas, each once, in the order given: "0,0.5,1"."""
    return _parse_list(text, _parse_depth, "depths", "0,0.5,1")


def parse_methods(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Methods to compare, separated by commas; "+" puts several into one model.

    "unmodified,longmamba+decimamba" gives (("unmodified", ()),
    ("longmamba+decimamba", ("longmamba", "decimamba"))).

    Raises:
        WidefieldError: for an unknown method or one that is combined with itself.
    """
    return _parse_list(text, _parse_method, "methods", "unmodified,longmamba")


def _parse_list(text: str, parse: Callable[[str], T], kind: str, example: str) -> tuple[T, ...]:
    if not all(part.strip() for part in text.split(",")):
        raise WidefieldError(
            f"{text!r} is not a list of {kind}: separate them by commas: {example}"
        )
    return tuple(dict.fromkeys(parse(part) for part in text.split(",")))


def _parse_depth(text: str) -> float:
    try:
        depth = float(text)
    except ValueError:
        depth = -1.0
    _check_depth(depth, text.strip())
    return depth


def _check_depth(depth: float, given: str) -> None:
    if not 0.0 <= depth <= 1.0:
        raise WidefieldError(f"{given!r} is not a depth: give a number from 0 (start) to 1 (end)")


def _parse_method(text: str) -> tuple[str, tuple[str, ...]]:
    from widefield.methods import METHODS

    parts = tuple(part.strip() for part in text.split("+"))
    if parts == (UNMODIFIED,):
        return UNMODIFIED, ()
    for part in parts:
        if part == UNMODIFIED:
            raise WidefieldError(f"{text.strip()!r}: {UNMODIFIED} cannot be combined with a method")
        if part not in METHODS:
            raise unknown("method", part, [UNMODIFIED, *METHODS])
    if len(set(parts)) < len(parts):
        raise WidefieldError(f"{text.strip()!r} names a method twice; give each once")
    return "+".join(parts), parts


def length_label(tokens: int) -> str:
    """A length for people: 16384 as "16k", 1048576 as "1M", 1000 as "1000"."""
    for unit, size in (("M", 1024**2), ("k", 1024)):
        if tokens >= size and (tokens * 2) % size == 0:
            return f"{tokens / size:g}{unit}"
    return str(tokens)
