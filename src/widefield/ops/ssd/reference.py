"""The scan of Mamba-2 in plain torch: slow, differentiable, the yardstick of every kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from widefield.ops._delta import effective_delta
from widefield.ops.ssd._sequences import by_sequence
from widefield.plan import LayerPlan, SSDInputs


def ssd(
    inputs: SSDInputs, plan: LayerPlan | None = None
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "sequences heads width state"],
]:
    """The recurrence of `SSDInputs`, one token after the other.

    Args:
        inputs: what the scan reads; see `SSDInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32 (float64 if x is).
    """
    if inputs.cu_seqlens is not None:
        return by_sequence(ssd, inputs, plan)
    delta = effective_delta(inputs, plan)
    dtype = delta.dtype
    x = inputs.x.to(dtype)
    batch, length, heads, width = x.shape
    share = heads // inputs.B.shape[2]
    B, C = (t.to(dtype).repeat_interleave(share, dim=2) for t in (inputs.B, inputs.C))
    A = inputs.A.to(dtype)
    if plan is not None and plan.decay_scale is not None:
        A = A * plan.decay_scale.to(dtype)
    decay = torch.exp(delta * (A if A.ndim == 1 else A[:, None, :]))

    state = inputs.initial_state
    state = x.new_zeros(batch, heads, width, B.shape[-1]) if state is None else state.to(dtype)
    written = delta[..., None] * x
    if inputs.valid is not None:
        written = written.masked_fill(~inputs.valid[..., None, None], 0.0)
    outputs = []
    for t in range(length):
        new = written[:, t, :, :, None] * B[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + new
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if inputs.D is not None:
        y = y + inputs.D.to(dtype)[:, None] * x
    if inputs.valid is not None:
        y = y.masked_fill(~inputs.valid[..., None, None], 0.0)
    return y.to(inputs.x.dtype), state


def gated(
    y: Float[Tensor, "batch length heads width"],
    z: Float[Tensor, "batch length heads width"],
    gain: Float[Tensor, " channels"],
) -> tuple[Float[Tensor, "batch length heads width"], Float[Tensor, "batch length parts"]]:
    """What a gate leaves of y, and sums of squares of each head; see `gated_ssd`."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide = y.to(dtype) * F.silu(z.to(dtype))
    return (wide * gain.to(dtype).view(y.shape[2:])).to(y.dtype), wide.square().sum(-1)
