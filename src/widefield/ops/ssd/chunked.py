"""The scan of Mamba-2 in plain torch by chunks: differentiable, on any device that has float64.

The same algebra as the kernel of the CPU (see cpu.py), for sequences that the reference, one token
after the other, takes too long for. A value that is not finite spoils the y of its whole chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from widefield.ops._delta import effective_delta, per_row
from widefield.ops.ssd._sequences import by_sequence
from widefield.plan import LayerPlan, SSDInputs

CHUNK = 64  # tokens
SEGMENT = 1024  # tokens whose chunks are computed at once
_LEAST = -1e3  # log of a decay that leaves nothing, even of the largest float64
_TINY = -87.0  # log of a decay below which float32 is subnormal, and products with it are slow


def ssd(
    inputs: SSDInputs, plan: LayerPlan | None = None
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "sequences heads width state"],
]:
    """The scan of Mamba-2 with the signature and the semantics of the reference.

    Args:
        inputs: what the scan reads; see `SSDInputs` for shapes and the recurrence.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32 (float64 if Δ is).
    """
    if inputs.cu_seqlens is not None:
        return by_sequence(ssd, inputs, plan)
    with torch.autocast(inputs.x.device.type, enabled=False):
        delta = effective_delta(inputs, plan)
        dtype = delta.dtype
        rates = inputs.A.to(dtype)
        if plan is not None and plan.decay_scale is not None:
            rates = rates * plan.decay_scale.to(dtype)
        logs = torch.clamp(delta.double() * per_row(rates).double(), min=_LEAST)
        x, B, C = (_without_padding(t.to(dtype), inputs) for t in (inputs.x, inputs.B, inputs.C))
        state = inputs.initial_state
        if state is None:
            state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
        state = state.to(dtype)
        parts = []
        for start in range(0, x.shape[1], SEGMENT):
            part = slice(start, start + SEGMENT)
            written = delta[:, part, :, None] * x[:, part]
            y, state = _segment(written, logs[:, part], B[:, part], C[:, part], state)
            parts.append(y)
        y = torch.cat(parts, dim=1)
        if inputs.D is not None:
            y = y + inputs.D.to(dtype)[:, None] * x
        return _without_padding(y, inputs).to(inputs.x.dtype), state


def _without_padding(tensor: Tensor, inputs: SSDInputs) -> Tensor:
    """Zero where a token is padding."""
    if inputs.valid is None:
        return tensor
    return tensor.masked_fill(~inputs.valid[..., None, None], 0.0)


def _segment(
    written: Float[Tensor, "batch length heads width"],
    logs: Float[Tensor, "batch length heads"],
    B: Float[Tensor, "batch length groups state"],
    C: Float[Tensor, "batch length groups state"],
    state: Float[Tensor, "batch heads width state"],
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "batch heads width state"],
]:
    """Outputs of some tokens, and the state after them; `logs` are those of each token's decay.

    In the subscripts: b batch, c chunk, i and j tokens, g group, r head of a group, p, n.
    """
    length, groups, dtype = written.shape[1], B.shape[2], written.dtype
    written, logs, B, C = (_in_chunks(t) for t in (written, logs, B, C))
    written = written.unflatten(3, (groups, -1))
    sums = logs.cumsum(2).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # bcgri

    y = _within(written, sums, B, C)
    left = _decay(sums[..., -1:] - sums, dtype).permute(0, 1, 4, 2, 3)  # of each token at the end
    new = torch.einsum("bcjgrp,bcjgn->bcgrpn", left[..., None] * written, B).flatten(2, 3)
    keep = _decay(sums[..., -1], dtype).flatten(2)[..., None, None]
    before = []
    for chunk in range(new.shape[1]):
        before.append(state)
        state = keep[:, chunk] * state + new[:, chunk]
    states = torch.stack(before, dim=1).unflatten(2, (groups, -1))
    read = torch.einsum("bcign,bcgrpn->bcigrp", C, states)
    y = y + _decay(sums, dtype).permute(0, 1, 4, 2, 3)[..., None] * read
    return y.flatten(3, 4).flatten(1, 2)[:, :length], state


def _within(
    written: Float[Tensor, "batch chunks token groups share width"],
    sums: Float[Tensor, "batch chunks groups share token"],
    B: Float[Tensor, "batch chunks token groups state"],
    C: Float[Tensor, "batch chunks token groups state"],
) -> Float[Tensor, "batch chunks token groups share width"]:
    """What each token reads of those of its own chunk."""
    chunk, device = sums.shape[-1], sums.device
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -math.inf)
    products = torch.einsum("bcign,bcjgn->bcgij", C, B)
    weights = _decay(between, written.dtype) * products[:, :, :, None]
    return torch.einsum("bcgrij,bcjgrp->bcigrp", weights, written)


def _decay(logs: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left after decays that add up to `logs`, in float64."""
    logs = logs.to(dtype)
    return torch.exp(logs if dtype == torch.float64 else logs.masked_fill(logs < _TINY, -math.inf))


def _in_chunks(tensor: Tensor) -> Tensor:
    """(B, L, …) as (B, chunks, tokens, …); tokens of zeros, which change no state, are added."""
    chunk = min(CHUNK, tensor.shape[1])
    more = -tensor.shape[1] % chunk
    padded = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, more))
    return padded.unflatten(1, (-1, chunk))
