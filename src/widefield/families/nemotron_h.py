"""transformers' NemotronH: Mamba-2 layers among attention without positions, MLPs and experts."""

from __future__ import annotations

from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHBlock,
    NemotronHMamba2Mixer,
    NemotronHRMSNorm,
)

from widefield.families._attention import why_no_mask
from widefield.families._blocks import DroppingBlock
from widefield.families._norms import GatedNorm, Norm
from widefield.families.ssd import SSDMixer

try:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated
except ImportError:  # older versions of transformers take that of Zamba2
    from transformers.models.zamba2.modeling_zamba2 import (
        Zamba2RMSNormGated as NemotronHRMSNormGated,
    )


class WidefieldNemotronHMamba2Mixer(SSDMixer, NemotronHMamba2Mixer):
    """`NemotronHMamba2Mixer` on our kernels."""


class WidefieldNemotronHBlock(DroppingBlock, NemotronHBlock):
    """`NemotronHBlock` of any kind, behind or around a mixer that may drop tokens."""


def why_not_decimate(model: nn.Module) -> str | None:
    """Its attention layers need masks that differ."""
    return why_no_mask(model)


class WidefieldNemotronHRMSNorm(Norm, NemotronHRMSNorm):
    """`NemotronHRMSNorm` in one pass."""

    widens = False


class WidefieldNemotronHRMSNormGated(GatedNorm, NemotronHRMSNormGated):  # type: ignore[misc]
    """NemotronH's gated norm in one pass."""


SWAPS = {
    NemotronHRMSNorm: WidefieldNemotronHRMSNorm,
    NemotronHRMSNormGated: WidefieldNemotronHRMSNormGated,
    NemotronHMamba2Mixer: WidefieldNemotronHMamba2Mixer,
    NemotronHBlock: WidefieldNemotronHBlock,
}
