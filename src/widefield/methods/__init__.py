"""The methods: from (calibration, context length) to a `LayerPlan`. Data in, data out; no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from widefield.calibration import Calibration
from widefield.errors import WidefieldError, unknown
from widefield.methods.base import Method
from widefield.methods.decimamba import DeciMamba, find_first_layer
from widefield.methods.longmamba import LongMamba
from widefield.plan import LayerPlan, Pool

__all__ = [
    "METHODS",
    "DeciMamba",
    "LongMamba",
    "Method",
    "find_first_layer",
    "from_config",
    "get",
    "plan_layer",
]

METHODS: dict[str, type[Any]] = {"decimamba": DeciMamba, "longmamba": LongMamba}


def get(name: str) -> type[Any]:
    """The class of a method by its registered name.

    Raises:
        WidefieldError: if there is none, with the nearest names.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def from_config(
    name: str, options: Mapping[str, Any], calibration: Calibration | None = None
) -> Method:
    """A method from plain values, as they stand in JSON, YAML or on a command line.

    Args:
        name: registered name, e.g. "longmamba".
        options: its options by name, as `describe()` gives them; what is missing has its default.
        calibration: of the model, for methods that need one.

    Raises:
        WidefieldError: for an unknown method or option, a value out of range, or a missing
            calibration.
    """
    kind = get(name)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init and f.name != "calibration"}
    for option in options:
        if option not in fields:
            raise unknown(f"option of {name}", option, fields)
    for option, given in fields.items():
        if given.default is dataclasses.MISSING and option not in options:
            raise WidefieldError(f"{name} needs the option {option!r}: give it, e.g. {option}=[3]")
    values = {option: _number(value, fields[option]) for option, value in options.items()}
    return kind(calibration=calibration, **values)


def _number(value: Any, option: dataclasses.Field[Any]) -> Any:
    """YAML reads 1e-30 as text; where an option has a number, such text is meant as one."""
    if isinstance(value, str) and isinstance(option.default, float):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def plan_layer(
    methods: Sequence[Method], layer: int, seen: Sequence[int], new: Sequence[int]
) -> LayerPlan:
    """The plan of one layer for one prefill, from all methods together.

    Tokens are dropped first, so the other methods see the context length seen + min(new, kept). Of
    two floors the larger holds, scales are multiplied. Where nothing is asked for a field, it is
    None.

    Args:
        methods: none or several, each of another kind.
        layer: the model's own index of the layer.
        seen: tokens that the cache already holds, one number for all rows or one a row.
        new: tokens of this prefill that reach this layer, one number or one a row.

    Raises:
        WidefieldError: if two methods cannot be combined.
    """
    _check_combination(methods)
    rows = _rows(seen, new)
    lengths = _collapse([old + added for old, added in rows])
    plans = [method.plan(layer, lengths) for method in methods]
    pool = _one_pool(plans, methods)
    if pool is not None and pool.keep >= max(added for _, added in rows):
        pool = None
    if pool is not None:
        lengths = _collapse([old + min(added, pool.keep) for old, added in rows])
        plans = [method.plan(layer, lengths) for method in methods]
    return LayerPlan(
        delta_floor=_merge([plan.delta_floor for plan in plans], torch.maximum),
        delta_scale=_merge([plan.delta_scale for plan in plans], torch.mul),
        decay_scale=_merge([plan.decay_scale for plan in plans], torch.mul),
        pool=pool,
    )


def _check_combination(methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise WidefieldError(
                f"{name} is given {names.count(name)} times: "
                "give each method once, with all its options"
            )


def _rows(seen: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    count = max(len(seen), len(new))
    if not len(seen) or not len(new) or {len(seen), len(new)} - {1, count}:
        raise WidefieldError(
            f"{len(seen)} context lengths for {len(new)} rows: expected one for all or one for each"
        )
    wide = [list(n) * count if len(n) == 1 else list(n) for n in (seen, new)]
    return list(zip(*wide, strict=True))


def _collapse(lengths: Sequence[int]) -> tuple[int, ...]:
    """One number where all rows agree."""
    return tuple(lengths[:1]) if len(set(lengths)) == 1 else tuple(lengths)


def _one_pool(plans: Sequence[LayerPlan], methods: Sequence[Method]) -> Pool | None:
    pooling = [(m.name, p.pool) for m, p in zip(methods, plans, strict=True) if p.pool is not None]
    if len(pooling) > 1:
        names = " and ".join(name for name, _ in pooling)
        raise WidefieldError(f"{names} both drop tokens in the same layer: use one of them")
    return pooling[0][1] if pooling else None


def _merge(
    tensors: Sequence[Tensor | None], how: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | None:
    """Several tensors as one, by rows where any of them has rows; None where there is none."""
    merged: Tensor | None = None
    for tensor in tensors:
        if tensor is not None:
            merged = tensor if merged is None else how(merged, tensor)
    return merged
