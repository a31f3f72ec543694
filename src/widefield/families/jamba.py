"""transformers' Jamba: Mamba-1 with learned norms on Δ, B and C; attention and experts between."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.jamba.modeling_jamba import (
    JambaAttentionDecoderLayer,
    JambaMambaDecoderLayer,
    JambaMambaMixer,
    JambaRMSNorm,
)

from widefield.families._attention import why_no_mask
from widefield.families._blocks import DroppingBlock
from widefield.families._norms import Norm
from widefield.families.mamba1 import NormedMamba1Mixer


class WidefieldJambaMambaMixer(NormedMamba1Mixer, JambaMambaMixer):
    """`JambaMambaMixer` on our kernels."""


class WidefieldJambaMambaDecoderLayer(DroppingBlock, JambaMambaDecoderLayer):
    """`JambaMambaDecoderLayer` whose mixer may drop tokens."""

    def normed(self, hidden_states: Tensor) -> Tensor:
        """What the block gives its mixer to read."""
        return self.input_layernorm(hidden_states)


class WidefieldJambaAttentionDecoderLayer(DroppingBlock, JambaAttentionDecoderLayer):
    """`JambaAttentionDecoderLayer` behind layers that drop tokens."""


class WidefieldJambaRMSNorm(Norm, JambaRMSNorm):
    """`JambaRMSNorm` in one pass."""


SWAPS = {
    JambaRMSNorm: WidefieldJambaRMSNorm,
    JambaMambaMixer: WidefieldJambaMambaMixer,
    JambaMambaDecoderLayer: WidefieldJambaMambaDecoderLayer,
    JambaAttentionDecoderLayer: WidefieldJambaAttentionDecoderLayer,
}


def why_not_decimate(model: nn.Module) -> str | None:
    """Its attention layers need masks that differ."""
    return why_no_mask(model)
