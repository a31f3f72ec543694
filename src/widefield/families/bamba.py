"""transformers' Bamba: Mamba-2 layers, and a few of attention with rotary positions."""

from __future__ import annotations

from torch import nn
from transformers.models.bamba.modeling_bamba import BambaMixer

from widefield.families.ssd import SSDMixer


class WidefieldBambaMixer(SSDMixer, BambaMixer):
    """`BambaMixer` on our kernels."""


def why_not_decimate(model: nn.Module) -> str | None:
    """Rotary positions are made once for all layers, before any drops a token."""
    return "its attention layers share one table of rotary positions for the full length"


SWAPS = {BambaMixer: WidefieldBambaMixer}
