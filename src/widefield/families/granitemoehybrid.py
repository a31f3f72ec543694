"""transformers' GraniteMoeHybrid: Mamba-2 or attention, then experts and a shared MLP, a layer."""

from __future__ import annotations

from torch import nn
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridDecoderLayer,
    GraniteMoeHybridMambaLayer,
)

from widefield.families._blocks import DroppingBlock
from widefield.families.ssd import SSDMixer


class WidefieldGraniteMoeHybridMambaLayer(SSDMixer, GraniteMoeHybridMambaLayer):
    """`GraniteMoeHybridMambaLayer` on our kernels."""


class WidefieldGraniteMoeHybridDecoderLayer(DroppingBlock, GraniteMoeHybridDecoderLayer):
    """`GraniteMoeHybridDecoderLayer` of either kind, which may drop tokens."""


def why_not_decimate(model: nn.Module) -> str | None:
    """Rotary positions are made once for all layers, before any drops a token."""
    config = model.config
    if getattr(config, "position_embedding_type", None) != "rope":
        return None
    return "its attention layers share one table of rotary positions for the full length"


SWAPS = {
    GraniteMoeHybridMambaLayer: WidefieldGraniteMoeHybridMambaLayer,
    GraniteMoeHybridDecoderLayer: WidefieldGraniteMoeHybridDecoderLayer,
}
