"""transformers' Bamba: Mamba-2 layers, and a few of attention with rotary positions."""

from __future__ import annotations

from torch import nn
from transformers.models.bamba.modeling_bamba import BambaMixer, BambaRMSNorm, BambaRMSNormGated

from widefield.families._norms import GatedNorm, Norm
from widefield.families.ssd import SSDMixer


class WidefieldBambaMixer(SSDMixer, BambaMixer):
    """`BambaMixer` on our kernels."""


def why_not_decimate(model: nn.Module) -> str | None:
    """Rotary positions are made once for all layers, before any drops a token."""
    return "its attention layers share one table of rotary positions for the full length"


class WidefieldBambaRMSNorm(Norm, BambaRMSNorm):
    """`BambaRMSNorm` in one pass."""


class WidefieldBambaRMSNormGated(GatedNorm, BambaRMSNormGated):
    """`BambaRMSNormGated` in one pass."""


SWAPS = {
    BambaMixer: WidefieldBambaMixer,
    BambaRMSNorm: WidefieldBambaRMSNorm,
    BambaRMSNormGated: WidefieldBambaRMSNormGated,
}
