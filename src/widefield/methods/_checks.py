"""Checks of options that methods share: what was given, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from widefield.errors import WidefieldError, unknown
from widefield.plan import ModelLayout


def real(option: str, value: Any, expected: str, *, above: float, below: float = math.inf) -> None:
    """Raise unless `value` is a number with above < value < below."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < below:
        raise WidefieldError(f"{option}={value!r}: expected {expected}")


def whole(option: str, value: Any, expected: str, *, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise WidefieldError(f"{option}={value!r}: expected {expected}")


def one_of(option: str, value: Any, known: Sequence[str]) -> None:
    """Raise unless `value` is one of the known names, with the nearest of them."""
    if value not in known:
        raise unknown(option, str(value), known)


def indices(option: str, value: Any) -> tuple[int, ...]:
    """A tuple from one layer index or several in ascending order."""
    found = (value,) if isinstance(value, int) else value
    good = isinstance(found, list | tuple) and len(found) > 0
    good = good and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found)
    if not good or list(found) != sorted(set(found)):
        raise WidefieldError(
            f"{option}={value!r}: expected the indices of one or more layers, ascending, "
            "e.g. [3, 5]"
        )
    return tuple(found)


def present(option: str, layers: Sequence[int], layout: ModelLayout) -> None:
    """Raise if one of `layers` is no Mamba layer of the model."""
    missing = [layer for layer in layers if layer not in layout.layers]
    if missing:
        raise WidefieldError(
            f"{option}={list(layers)}: {layout.model_class} has no Mamba layer "
            f"{', '.join(map(str, missing))}; it has {', '.join(map(str, layout.layers))}"
        )
