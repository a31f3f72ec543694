"""transformers' Mamba."""

from __future__ import annotations

from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

from widefield.families._blocks import DroppingBlock
from widefield.families.mamba1 import Mamba1Mixer


class WidefieldMambaMixer(Mamba1Mixer, MambaMixer):
    """`MambaMixer` on our kernels."""


class WidefieldMambaBlock(DroppingBlock, MambaBlock):
    """`MambaBlock` whose mixer may drop tokens."""


SWAPS = {MambaMixer: WidefieldMambaMixer, MambaBlock: WidefieldMambaBlock}
