"""transformers' Mamba2."""

from __future__ import annotations

from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2Mixer,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from widefield.families._blocks import ResidualBlock
from widefield.families._norms import GatedNorm, Norm
from widefield.families.ssd import SSDMixer


class WidefieldMamba2Mixer(SSDMixer, Mamba2Mixer):
    """`Mamba2Mixer` on our kernels."""


class WidefieldMamba2Block(ResidualBlock, Mamba2Block):
    """`Mamba2Block` whose mixer may drop tokens."""


class WidefieldMamba2RMSNorm(Norm, Mamba2RMSNorm):
    """`Mamba2RMSNorm` in one pass."""


class WidefieldMambaRMSNormGated(GatedNorm, MambaRMSNormGated):
    """`MambaRMSNormGated` in one pass."""


SWAPS = {
    Mamba2Mixer: WidefieldMamba2Mixer,
    Mamba2Block: WidefieldMamba2Block,
    Mamba2RMSNorm: WidefieldMamba2RMSNorm,
    MambaRMSNormGated: WidefieldMambaRMSNormGated,
}
