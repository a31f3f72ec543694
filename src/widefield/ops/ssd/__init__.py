"""The scan of Mamba-2 (state-space duality): one signature for every implementation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose, is_forced, runs_kernels
from widefield.ops.ssd import chunked, reference
from widefield.ops.ssd._sequences import check_sequences
from widefield.plan import LayerPlan, SSDInputs

__all__ = ["gated_ssd", "gates_in_the_scan", "ssd"]
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


def gates_in_the_scan(
    inputs: SSDInputs,
    z: Float[Tensor, "batch length heads width"],
    gain: Float[Tensor, " channels"],
) -> bool:
    """Whether a kernel that has no backward makes `gated_ssd` of these in one pass."""
    if not runs_kernels(*_tensors(inputs), z, gain):
        return False
    from widefield.ops.ssd import cuda

    return cuda.gates(inputs, z, gain)


def gated_ssd(
    inputs: SSDInputs,
    z: Float[Tensor, "batch length heads width"],
    gain: Float[Tensor, " channels"],
    plan: LayerPlan | None = None,
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "sequences heads width state"],
    Float[Tensor, "batch length parts"],
]:
    """The scan of Mamba-2 whose output passes a gate, for a norm whose scale comes later.

    Args:
        inputs: what the scan reads.
        z: the gate before its silu.
        gain: the weight of the norm, H · P numbers.
        plan: what a method asks of this layer, or None.

    Returns:
        y · silu(z) · gain in the dtype of x; the final state; sums of (y · silu(z))² in float32,
        whose own sum over the last dimension is that over all channels.

    Raises:
        WidefieldError: as `ssd` does.
    """
    check_sequences(inputs)
    if gates_in_the_scan(inputs, z, gain):
        from widefield.ops.ssd import cuda

        return cuda.gated_ssd(inputs, z, gain, plan)
    y, state = ssd(inputs, plan)
    gated, squares = reference.gated(y, z, gain)
    return gated, state, squares


def _tensors(inputs: SSDInputs) -> tuple[Tensor | None, ...]:
    return (
        inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.delta_bias,
        inputs.initial_state,
    )  # fmt: skip
