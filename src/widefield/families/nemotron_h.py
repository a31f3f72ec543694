"""transformers' NemotronH: Mamba-2 layers among attention without positions, MLPs and experts."""

from __future__ import annotations

from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHBlock,
    NemotronHMamba2Mixer,
    NemotronHRMSNorm,
    NemotronHRMSNormGated,
)

from widefield.families._attention import why_no_mask
from widefield.families._blocks import DroppingBlock
from widefield.families._norms import GatedNorm, Norm
from widefield.families.ssd import SSDMixer


class WidefieldNemotronHMamba2Mixer(SSDMixer, NemotronHMamba2Mixer):
    """`NemotronHMamba2Mixer` on our kernels."""


class WidefieldNemotronHBlock(DroppingBlock, NemotronHBlock):
    """`NemotronHBlock` of any kind, behind or around a mixer that may drop tokens."""


def why_not_decimate(model: nn.Module) -> str | None:
    """Its attention layers need masks that differ."""
    return why_no_mask(model)


class WidefieldNemotronHRMSNorm(Norm, NemotronHRMSNorm):
    """`NemotronHRMSNorm` in one pass."""

    keeps_dtype = True


class WidefieldNemotronHRMSNormGated(GatedNorm, NemotronHRMSNormGated):
    """`NemotronHRMSNormGated` in one pass."""


SWAPS = {
    NemotronHRMSNorm: WidefieldNemotronHRMSNorm,
    NemotronHRMSNormGated: WidefieldNemotronHRMSNormGated,
    NemotronHMamba2Mixer: WidefieldNemotronHMamba2Mixer,
    NemotronHBlock: WidefieldNemotronHBlock,
}
