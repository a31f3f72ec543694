"""transformers' FalconH1: Mamba-2 and attention side by side in every layer, scaled by muP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon_h1.modeling_falcon_h1 import (
    FalconH1Mixer,
    FalconH1RMSNorm,
    FalconH1RMSNormGated,
)

from widefield.families._norms import GatedNorm, Norm
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


class WidefieldFalconH1RMSNorm(Norm, FalconH1RMSNorm):
    """`FalconH1RMSNorm` in one pass."""


class WidefieldFalconH1RMSNormGated(GatedNorm, FalconH1RMSNormGated):
    """`FalconH1RMSNormGated` in one pass."""

    @property
    def groups(self) -> int:
        """How many parts of the last dimension are normed apart."""
        return self.n_groups

    @property
    def gate_first(self) -> bool:
        """Whether the gate comes before the norm; its config says so."""
        return not self.norm_before_gate


SWAPS = {
    FalconH1Mixer: WidefieldFalconH1Mixer,
    FalconH1RMSNorm: WidefieldFalconH1RMSNorm,
    FalconH1RMSNormGated: WidefieldFalconH1RMSNormGated,
}
