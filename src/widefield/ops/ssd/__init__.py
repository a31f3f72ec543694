"""The scan of Mamba-2 (state-space duality): one signature for every implementation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from widefield.ops.ssd import reference
from widefield.plan import LayerPlan, SSDInputs

__all__ = ["ssd"]


def ssd(
    inputs: SSDInputs, plan: LayerPlan | None = None
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "batch heads width state"],
]:
    """Run the scan of Mamba-2 with the best implementation for the inputs' device.

    Args:
        inputs: what the scan reads; see `SSDInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None for the unmodified scan.

    Returns:
        y (B, L, H, P) in the dtype of x, and the final state (B, H, P, N) in float32.
    """
    return reference.ssd(inputs, plan)
