"""The selective scan in plain torch: slow, differentiable, the yardstick of every kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from widefield.ops._delta import effective_delta
from widefield.ops.selective_scan._packed import by_sequence
from widefield.plan import LayerPlan, ScanInputs


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan | None = None
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "sequences channels state"]]:
    """Selective scan, one token after the other.

    Args:
        inputs: what the scan reads; see `ScanInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32 (float64 if x is).

    Raises:
        WidefieldError: if `cu_seqlens` does not fit to the other inputs.
    """
    if inputs.cu_seqlens is not None:
        return by_sequence(selective_scan, inputs, plan)
    delta = effective_delta(inputs, plan)
    dtype = delta.dtype
    x, B, C = inputs.x.to(dtype), inputs.B.to(dtype), inputs.C.to(dtype)
    A = inputs.A.to(dtype)[None]
    if plan is not None and plan.decay_scale is not None:
        scale = plan.decay_scale.to(dtype)
        A = A * (scale[None, :, None] if scale.ndim == 1 else scale[..., None])

    batch, length, channels = x.shape
    state = inputs.initial_state
    state = x.new_zeros(batch, channels, A.shape[-1]) if state is None else state.to(dtype)
    written = delta * x
    if inputs.valid is not None:
        written = written.masked_fill(~inputs.valid[..., None], 0.0)
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + written[:, t, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    if inputs.D is not None:
        y = y + inputs.D.to(dtype) * x
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(dtype))
    if inputs.valid is not None:
        y = y.masked_fill(~inputs.valid[..., None], 0.0)
    return y.to(inputs.x.dtype), state
