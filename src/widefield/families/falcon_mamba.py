"""transformers' FalconMamba: Mamba-1 with weightless RMS norms on Δ, B and C."""

from __future__ import annotations

from transformers.models.falcon_mamba.modeling_falcon_mamba import (
    FalconMambaBlock,
    FalconMambaMixer,
)

from widefield.families._blocks import DroppingBlock
from widefield.families.mamba1 import NormedMamba1Mixer


class WidefieldFalconMambaMixer(NormedMamba1Mixer, FalconMambaMixer):
    """`FalconMambaMixer` on our kernels."""


class WidefieldFalconMambaBlock(DroppingBlock, FalconMambaBlock):
    """`FalconMambaBlock` whose mixer may drop tokens."""


SWAPS = {
    FalconMambaMixer: WidefieldFalconMambaMixer,
    FalconMambaBlock: WidefieldFalconMambaBlock,
}
