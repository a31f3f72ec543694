"""Sequences that lie side by side in one row: what is asked of them, and one scan for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.plan import LayerPlan, SSDInputs

__all__ = ["by_sequence", "check_sequences"]
Scan = Callable[[SSDInputs, LayerPlan | None], tuple[Tensor, Tensor]]


def check_sequences(inputs: SSDInputs) -> None:
    """Refuse `cu_seqlens` whose kind is wrong, without reading what it holds.

    Raises:
        WidefieldError: if it is no vector of int32 or int64, or stands beside `valid` or a batch.
    """
    ends = inputs.cu_seqlens
    if ends is None:
        return
    if ends.dtype not in (torch.int32, torch.int64) or ends.ndim != 1 or len(ends) < 2:
        raise WidefieldError(
            f"cu_seqlens is {tuple(ends.shape)} of {ends.dtype}, expected (sequences + 1,) of "
            "int32 or int64; give the first token of each sequence, then the length of all"
        )
    if inputs.x.shape[0] != 1:
        raise WidefieldError(
            f"cu_seqlens with a batch of {inputs.x.shape[0]}, expected 1; "
            "lay all sequences side by side in one row"
        )
    if inputs.valid is not None:
        raise WidefieldError(
            "cu_seqlens together with valid, expected one of them; "
            "leave padding out where sequences lie side by side"
        )


def by_sequence(scan: Scan, inputs: SSDInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    """The scan of each sequence of `cu_seqlens`, one after the other.

    Args:
        scan: of a row that is one sequence.
        inputs: with `cu_seqlens`.
        plan: fields per row have a row for each sequence.

    Returns:
        y (1, L, H, P), and the final state (S, H, P, N) of each sequence.

    Raises:
        WidefieldError: if `cu_seqlens` is not as `SSDInputs` says.
    """
    check_sequences(inputs)
    assert inputs.cu_seqlens is not None
    ends = inputs.cu_seqlens.tolist()
    length = inputs.x.shape[1]
    if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise WidefieldError(
            f"cu_seqlens {ends} of {length} tokens, expected ascending from 0 to {length}; "
            "give the first token of each sequence, then the length of all"
        )
    outputs, states = [], []
    for number, (start, stop) in enumerate(pairwise(ends)):
        part = _part(inputs, slice(start, stop), number)
        if start == stop:
            states.append(_before(part))
            continue
        y, state = scan(part, _plan_of(plan, number))
        outputs.append(y)
        states.append(state)
    y = torch.cat(outputs, dim=1) if outputs else torch.empty_like(inputs.x)
    return y, torch.cat(states)


def _part(inputs: SSDInputs, part: slice, number: int) -> SSDInputs:
    initial = inputs.initial_state
    return inputs.replace(
        x=inputs.x[:, part],
        delta=inputs.delta[:, part],
        B=inputs.B[:, part],
        C=inputs.C[:, part],
        initial_state=None if initial is None else initial[number : number + 1],
        cu_seqlens=None,
    )


def _before(inputs: SSDInputs) -> Tensor:
    """The state before the first token, as a scan returns states."""
    dtype = torch.float64 if inputs.delta.dtype == torch.float64 else torch.float32
    if inputs.initial_state is not None:
        return inputs.initial_state.to(dtype)
    _, _, heads, width = inputs.x.shape
    return inputs.x.new_zeros(1, heads, width, inputs.B.shape[-1], dtype=dtype)


def _plan_of(plan: LayerPlan | None, number: int) -> LayerPlan | None:
    """The plan of one sequence."""
    if plan is None:
        return None
    names = ("delta_floor", "delta_scale", "decay_scale")
    rows = {n: v for n in names if (v := getattr(plan, n)) is not None and v.ndim == 2}
    return replace(plan, **{name: value[number] for name, value in rows.items()})
