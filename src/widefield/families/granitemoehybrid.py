"""transformers' GraniteMoeHybrid: Mamba-2 or attention, then experts and a shared MLP, a layer."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridDecoderLayer,
    GraniteMoeHybridMambaLayer,
    GraniteMoeHybridRMSNorm,
    GraniteMoeHybridRMSNormGated,
)

from widefield.families._attention import why_no_mask
from widefield.families._blocks import DroppingBlock
from widefield.families._norms import GatedNorm, Norm
from widefield.families.ssd import SSDMixer


class WidefieldGraniteMoeHybridMambaLayer(SSDMixer, GraniteMoeHybridMambaLayer):
    """`GraniteMoeHybridMambaLayer` on our kernels."""


class WidefieldGraniteMoeHybridDecoderLayer(DroppingBlock, GraniteMoeHybridDecoderLayer):
    """`GraniteMoeHybridDecoderLayer` of either kind, which may drop tokens."""

    def normed(self, hidden_states: Tensor) -> Tensor:
        """What the block gives its mixer to read."""
        return self.input_layernorm(hidden_states)


def why_not_decimate(model: nn.Module) -> str | None:
    """Rotary positions are made once for all layers, before any drops a token."""
    config = model.config
    if getattr(config, "position_embedding_type", None) != "rope":
        return why_no_mask(model)
    return "its attention layers share one table of rotary positions for the full length"


class WidefieldGraniteMoeHybridRMSNorm(Norm, GraniteMoeHybridRMSNorm):
    """`GraniteMoeHybridRMSNorm` in one pass."""


class WidefieldGraniteMoeHybridRMSNormGated(GatedNorm, GraniteMoeHybridRMSNormGated):
    """`GraniteMoeHybridRMSNormGated` in one pass."""


SWAPS = {
    GraniteMoeHybridRMSNorm: WidefieldGraniteMoeHybridRMSNorm,
    GraniteMoeHybridRMSNormGated: WidefieldGraniteMoeHybridRMSNormGated,
    GraniteMoeHybridMambaLayer: WidefieldGraniteMoeHybridMambaLayer,
    GraniteMoeHybridDecoderLayer: WidefieldGraniteMoeHybridDecoderLayer,
}
