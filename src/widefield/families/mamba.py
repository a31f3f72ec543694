"""transformers' Mamba."""

from __future__ import annotations

from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer

from widefield.families.mamba1 import Mamba1Block, Mamba1Mixer


class WidefieldMambaMixer(Mamba1Mixer, MambaMixer):
    """`MambaMixer` on our kernels."""


class WidefieldMambaBlock(Mamba1Block, MambaBlock):
    """`MambaBlock` whose mixer may drop tokens."""


SWAPS = {MambaMixer: WidefieldMambaMixer, MambaBlock: WidefieldMambaBlock}
