"""transformers' FalconMamba: Mamba-1 with weightless RMS norms on Δ, B and C."""

from __future__ import annotations

from transformers.models.falcon_mamba.modeling_falcon_mamba import (
    FalconMambaBlock,
    FalconMambaMixer,
    FalconMambaRMSNorm,
    FalconMambaWeightlessRMSNorm,
)

from widefield.families._blocks import ResidualBlock
from widefield.families._norms import Norm, WeightlessNorm
from widefield.families.mamba1 import NormedMamba1Mixer


class WidefieldFalconMambaMixer(NormedMamba1Mixer, FalconMambaMixer):
    """`FalconMambaMixer` on our kernels."""


class WidefieldFalconMambaBlock(ResidualBlock, FalconMambaBlock):
    """`FalconMambaBlock` whose mixer may drop tokens."""


class WidefieldFalconMambaRMSNorm(Norm, FalconMambaRMSNorm):
    """`FalconMambaRMSNorm` in one pass."""


class WidefieldFalconMambaWeightlessRMSNorm(WeightlessNorm, FalconMambaWeightlessRMSNorm):
    """`FalconMambaWeightlessRMSNorm` in one pass."""


SWAPS = {
    FalconMambaMixer: WidefieldFalconMambaMixer,
    FalconMambaBlock: WidefieldFalconMambaBlock,
    FalconMambaWeightlessRMSNorm: WidefieldFalconMambaWeightlessRMSNorm,
    FalconMambaRMSNorm: WidefieldFalconMambaRMSNorm,
}
