"""Bad input: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["WidefieldError", "unknown"]


class WidefieldError(ValueError):
    """Bad input. The command line prints its message on one line and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> WidefieldError:
    """An error for a name that is not registered, with the nearest known names.

    Args:
        kind: what the name should have been, e.g. "method".
        name: what was given.
        known: all names that would have been right.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return WidefieldError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")
