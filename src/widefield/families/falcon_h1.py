"""transformers' FalconH1: Mamba-2 and attention side by side in every layer, scaled by muP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

from widefield.families.ssd import SSDMixer


class WidefieldFalconH1Mixer(SSDMixer, FalconH1Mixer):
    """`FalconH1Mixer` on our kernels."""

    mup_vector: Tensor
    ssm_in_multiplier: float
    mamba_rms_norm: bool

    def project(self, hidden_states: Tensor) -> Tensor:
        """The projection with its multipliers."""
        return self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """The norm is optional here; without it the gate stands alone."""
        return self.norm(y, gate) if self.mamba_rms_norm else y * F.silu(gate)


def why_not_decimate(model: nn.Module) -> str | None:
    """Attention and mixer read the same tokens side by side, and positions are made for all."""
    return "each layer adds its attention's output over all tokens to that of the mixer"


SWAPS = {FalconH1Mixer: WidefieldFalconH1Mixer}
