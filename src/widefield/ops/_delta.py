"""Δ as a scan uses it, in plain torch; the same for both generations of Mamba."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.plan import LayerPlan, ScanInputs, SSDInputs

__all__ = ["effective_delta", "per_row"]


def effective_delta(inputs: ScanInputs | SSDInputs, plan: LayerPlan | None = None) -> Tensor:
    """Δ as the scan uses it: bias, softplus, limits, scale, floor, padding; float32 or float64.

    Args:
        inputs: the scan's inputs.
        plan: what a method asks of this layer; None leaves Δ as the model has it.

    Returns:
        (B, L, D), or (B, L, H) for Mamba-2.
    """
    delta = inputs.delta if inputs.delta.dtype == torch.float64 else inputs.delta.float()
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias.to(delta.dtype)
    if inputs.delta_softplus:
        delta = F.softplus(delta)
    if isinstance(inputs, SSDInputs) and inputs.delta_limit != (0.0, math.inf):
        delta = torch.clamp(delta, *inputs.delta_limit)
    if plan is not None and plan.delta_scale is not None:
        delta = delta * per_row(plan.delta_scale)
    if plan is not None and plan.delta_floor is not None:
        delta = delta.masked_fill(delta < per_row(plan.delta_floor), 0.0)
    if inputs.valid is not None:
        delta = delta.masked_fill(~inputs.valid[..., None], 0.0)
    return delta


def per_row(values: Tensor) -> Tensor:
    """(D,) or (B, D) made to broadcast against (B, L, D)."""
    return values if values.ndim == 1 else values[:, None, :]
