"""Selective scan (Mamba-1): one signature, three implementations."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.selective_scan import reference
from widefield.plan import LayerPlan, ScanInputs

__all__ = ["selective_scan"]


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan | None = None
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch channels state"]]:
    """Run the selective scan with the best implementation for the inputs' device.

    Args:
        inputs: what the scan reads; see `ScanInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None for the unmodified scan.

    Returns:
        y (B, L, D) in the dtype of x, and the final state (B, D, N) in float32.
    """
    backend = choose(inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.z)
    if backend == "cpu":
        from widefield.ops.selective_scan import cpu

        return cpu.selective_scan(inputs, plan)
    if backend == "cuda":
        from widefield.ops.selective_scan import cuda

        return cuda.selective_scan(inputs, plan)
    return reference.selective_scan(inputs, plan)
