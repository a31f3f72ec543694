"""The scan of Mamba-2 (state-space duality): one signature for every implementation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose, is_forced
from widefield.ops.ssd import chunked, reference
from widefield.ops.ssd._sequences import check_sequences
from widefield.plan import LayerPlan, SSDInputs

__all__ = ["ssd"]
_HAS_FLOAT64 = ("cpu", "cuda")  # devices


def ssd(
    inputs: SSDInputs, plan: LayerPlan | None = None
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "sequences heads width state"],
]:
    """Run the scan of Mamba-2 with the best implementation for the inputs' device.

    Args:
        inputs: what the scan reads; see `SSDInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None for the unmodified scan.

    Returns:
        y (B, L, H, P) in the dtype of x, and the final state (B, H, P, N) in float32; where
        `cu_seqlens` is given, that of each of the S sequences (S, H, P, N).

    Raises:
        WidefieldError: if `cu_seqlens` is not as `SSDInputs` says.
    """
    check_sequences(inputs)
    backend = choose(inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C)
    if backend == "cpu":
        from widefield.ops.ssd import cpu

        return cpu.ssd(inputs, plan)
    if backend == "cuda":
        from widefield.ops.ssd import cuda

        return cuda.ssd(inputs, plan)
    if backend == "reference" and (is_forced() or inputs.x.device.type not in _HAS_FLOAT64):
        return reference.ssd(inputs, plan)
    return chunked.ssd(inputs, plan)
