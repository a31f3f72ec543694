"""Selective scan (Mamba-1): one signature, three implementations."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose, on_gpu
from widefield.ops.selective_scan import reference
from widefield.ops.selective_scan._packed import check
from widefield.plan import LayerPlan, ScanInputs

__all__ = ["selective_scan"]


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan | None = None
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "sequences channels state"]]:
    """Run the selective scan with the best implementation for the inputs' device.

    Args:
        inputs: what the scan reads; see `ScanInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None for the unmodified scan.

    Returns:
        y (B, L, D) in the dtype of x, and the final state (B, D, N) in float32; (S, D, N) where
        the row holds S sequences.

    Raises:
        WidefieldError: if `cu_seqlens` does not fit to the other inputs.
    """
    if inputs.cu_seqlens is not None:
        check(inputs, plan)
    if inputs.B.ndim == 4:
        return _by_group(inputs, plan)
    backend = choose(inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.z)
    if backend == "cpu":
        from widefield.ops.selective_scan import cpu

        return cpu.selective_scan(inputs, plan)
    if backend == "cuda":
        return on_gpu("selective_scan").selective_scan(inputs, plan)
    return reference.selective_scan(inputs, plan)


def _by_group(inputs: ScanInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    """One scan for each group of channels that has its own B and C."""
    groups = inputs.B.shape[2]
    width = inputs.x.shape[2] // groups
    parts = [slice(g * width, (g + 1) * width) for g in range(groups)]
    done = [
        selective_scan(_group(inputs, g, part), None if plan is None else _group_plan(plan, part))
        for g, part in enumerate(parts)
    ]
    return torch.cat([y for y, _ in done], dim=2), torch.cat([state for _, state in done], dim=1)


def _group(inputs: ScanInputs, group: int, part: slice) -> ScanInputs:
    state = inputs.initial_state
    return inputs.replace(
        x=inputs.x[..., part],
        delta=inputs.delta[..., part],
        A=inputs.A[part],
        B=inputs.B[:, :, group],
        C=inputs.C[:, :, group],
        D=None if inputs.D is None else inputs.D[part],
        z=None if inputs.z is None else inputs.z[..., part],
        delta_bias=None if inputs.delta_bias is None else inputs.delta_bias[part],
        initial_state=None if state is None else state[:, part],
    )


def _group_plan(plan: LayerPlan, part: slice) -> LayerPlan:
    fields = {name: getattr(plan, name) for name in ("delta_floor", "delta_scale", "decay_scale")}
    return replace(plan, **{n: None if v is None else v[..., part] for n, v in fields.items()})
