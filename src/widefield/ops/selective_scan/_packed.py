"""Several sequences side by side in one row: what must hold; the scan of one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.plan import LayerPlan, ScanInputs

__all__ = ["by_sequence", "check"]

Scan = Callable[[ScanInputs, LayerPlan | None], tuple[Tensor, Tensor]]


def check(inputs: ScanInputs, plan: LayerPlan | None) -> None:
    """Refuse what does not fit together, without a look at what the tensors hold.

    Args:
        inputs: what the scan reads, with or without `cu_seqlens`.
        plan: what a method asks of this layer, or None.

    Raises:
        WidefieldError: if `cu_seqlens` is of another dtype or shape, or there are several rows,
            padding, or states or plans of another number of sequences.
    """
    ends = inputs.cu_seqlens
    if ends is None:
        return
    if ends.dtype not in (torch.int32, torch.int64) or ends.ndim != 1 or len(ends) < 2:
        raise WidefieldError(
            f"cu_seqlens is {ends.dtype} of shape {tuple(ends.shape)}, expected int32 or int64 of "
            "shape (S + 1,): give a 0 and where each of the S sequences ends"
        )
    if inputs.x.shape[0] != 1:
        raise WidefieldError(
            f"cu_seqlens was given with {inputs.x.shape[0]} rows, expected 1: put all sequences "
            "side by side into one row"
        )
    if inputs.valid is not None:
        raise WidefieldError(
            "cu_seqlens was given together with valid, expected one of them: leave out the padding"
        )
    _check_rows(inputs, plan or LayerPlan(), len(ends) - 1)


def _check_rows(inputs: ScanInputs, plan: LayerPlan, sequences: int) -> None:
    fields = ("delta_floor", "delta_scale", "decay_scale")
    rows = {name: v for name in fields if (v := getattr(plan, name)) is not None and v.ndim == 2}
    if inputs.initial_state is not None:
        rows["initial_state"] = inputs.initial_state
    for name, value in rows.items():
        if value.shape[0] != sequences:
            raise WidefieldError(
                f"{name} has {value.shape[0]} rows, expected {sequences}: give one for each "
                "sequence of cu_seqlens"
            )


def by_sequence(scan: Scan, inputs: ScanInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    """Scan one sequence after the other.

    Args:
        scan: runs one sequence.
        inputs: what the scan reads, with `cu_seqlens`.
        plan: what a method asks of this layer, or None.

    Returns:
        y (1, L, D), and the final states (S, D, N).

    Raises:
        WidefieldError: as `check`, and if `cu_seqlens` does not ascend from 0 to the length.
    """
    check(inputs, plan)
    assert inputs.cu_seqlens is not None
    ends = inputs.cu_seqlens.tolist()
    length = inputs.x.shape[1]
    if ends[0] != 0 or ends[-1] != length or any(b < a for a, b in pairwise(ends)):
        raise WidefieldError(
            f"cu_seqlens is {ends if len(ends) < 20 else f'{ends[:9]}…{ends[-9:]}'}, expected "
            f"ascending numbers from 0 to the length {length}: give where each sequence ends"
        )
    done = [
        scan(_sequence(inputs, i, slice(*ends[i : i + 2])), _row(plan, i))
        for i in range(len(ends) - 1)
    ]
    return torch.cat([y for y, _ in done], dim=1), torch.cat([state for _, state in done])


def _sequence(inputs: ScanInputs, index: int, tokens: slice) -> ScanInputs:
    state = inputs.initial_state
    return inputs.replace(
        x=inputs.x[:, tokens],
        delta=inputs.delta[:, tokens],
        B=inputs.B[:, tokens],
        C=inputs.C[:, tokens],
        z=None if inputs.z is None else inputs.z[:, tokens],
        initial_state=None if state is None else state[index : index + 1],
        cu_seqlens=None,
    )


def _row(plan: LayerPlan | None, index: int) -> LayerPlan | None:
    if plan is None:
        return None
    fields = {name: getattr(plan, name) for name in ("delta_floor", "delta_scale", "decay_scale")}
    return replace(
        plan,
        **{
            name: value[index : index + 1] if value is not None and value.ndim == 2 else value
            for name, value in fields.items()
        },
    )
