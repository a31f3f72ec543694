"""transformers' Jamba: Mamba-1 with learned norms on Δ, B and C; attention and experts between."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.models.jamba.modeling_jamba import (
    JambaAttentionDecoderLayer,
    JambaMambaDecoderLayer,
    JambaMambaMixer,
)

from widefield.errors import WidefieldError
from widefield.families._context import Padding, carry, shortened
from widefield.families.mamba1 import Mamba1Mixer, normed_inputs

_MASKED_ATTENTION = ("eager", "sdpa")


class WidefieldJambaMambaMixer(Mamba1Mixer, JambaMambaMixer):
    """`JambaMambaMixer` on our kernels."""

    selective_inputs = normed_inputs


class WidefieldJambaMambaDecoderLayer(JambaMambaDecoderLayer):
    """`JambaMambaDecoderLayer` whose mixer may drop tokens."""

    mamba: WidefieldJambaMambaMixer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mixer and feed-forward: (B, L, H) → (B, L, H), or (B, k, H) if tokens are dropped."""
        if hidden_states.shape[1] == 0:
            return hidden_states
        normed = self.input_layernorm(hidden_states)
        note = shortened(hidden_states)
        mixed = self.mamba.mix(normed, hidden_states, past_key_values, attention_mask, note)
        hidden_states = mixed.residual + mixed.output
        if hidden_states.shape[1] == 0:
            return hidden_states
        fed = self.feed_forward(self.pre_ff_layernorm(hidden_states))
        return carry(hidden_states + fed, mixed.note)


class WidefieldJambaAttentionDecoderLayer(JambaAttentionDecoderLayer):
    """`JambaAttentionDecoderLayer` behind layers that drop tokens.

    The model makes one mask for all its attention layers, from the length of the first one's cache.
    A layer that has seen fewer tokens makes its own.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """Attention and feed-forward over whatever tokens there are."""
        if hidden_states.shape[1] == 0:
            return hidden_states
        note = shortened(hidden_states)
        valid = None
        raise NotImplementedError
