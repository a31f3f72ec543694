"""transformers' Mamba2."""

from __future__ import annotations

from transformers.models.mamba2.modeling_mamba2 import Mamba2Block, Mamba2Mixer

from widefield.families._blocks import DroppingBlock
from widefield.families.ssd import SSDMixer


class WidefieldMamba2Mixer(SSDMixer, Mamba2Mixer):
    """`Mamba2Mixer` on our kernels."""


class WidefieldMamba2Block(DroppingBlock, Mamba2Block):
    """`Mamba2Block` whose mixer may drop tokens."""


SWAPS = {Mamba2Mixer: WidefieldMamba2Mixer, Mamba2Block: WidefieldMamba2Block}
