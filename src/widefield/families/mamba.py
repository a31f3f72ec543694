"""transformers' Mamba."""

from __future__ import annotations

from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer, MambaRMSNorm

from widefield.families._blocks import ResidualBlock
from widefield.families._norms import Norm
from widefield.families.mamba1 import Mamba1Mixer


class WidefieldMambaMixer(Mamba1Mixer, MambaMixer):
    """`MambaMixer` on our kernels."""


class WidefieldMambaBlock(ResidualBlock, MambaBlock):
    """`MambaBlock` whose mixer may drop tokens."""


class WidefieldMambaRMSNorm(Norm, MambaRMSNorm):
    """`MambaRMSNorm` in one pass."""


SWAPS = {
    MambaMixer: WidefieldMambaMixer,
    MambaBlock: WidefieldMambaBlock,
    MambaRMSNorm: WidefieldMambaRMSNorm,
}
