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
from widefield.families._context import carry, mark_valid, shortened, valid_of
from widefield.families.mamba1 import NormedMamba1Mixer

_MASKED = ("eager", "sdpa")  # implementations of attention that read a mask of four dimensions


class WidefieldJambaMambaMixer(NormedMamba1Mixer, JambaMambaMixer):
    """`JambaMambaMixer` on our kernels."""


class WidefieldJambaMambaDecoderLayer(JambaMambaDecoderLayer):
    """`JambaMambaDecoderLayer` whose mixer may drop tokens."""

    mamba: WidefieldJambaMambaMixer
    feed_forward: nn.Module

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
            return hidden_states  # an earlier layer holds the tokens back until the last chunk
        normed = self.input_layernorm(hidden_states)
        note = shortened(hidden_states)
        mixed = self.mamba.mix(normed, hidden_states, past_key_values, attention_mask, note)
        out = mixed.residual + mixed.output
        if out.shape[1] != 0:
            out = out + self.feed_forward(self.pre_ff_layernorm(out))
        return mark_valid(carry(out, mixed.note), mixed.valid)


class WidefieldJambaAttentionDecoderLayer(JambaAttentionDecoderLayer):
    """`JambaAttentionDecoderLayer` behind layers that drop tokens.

    The model makes one mask for all its attention layers, as long as the cache of the first. A
    layer whose cache holds fewer tokens makes its own; Jamba knows no positions, so that a mask is
    all it needs.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """Attention and feed-forward over the tokens that are left."""
        if hidden_states.shape[1] == 0:
            return hidden_states
        out = super().forward(
            hidden_states,
            attention_mask=self._mask(hidden_states, attention_mask, past_key_values),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return mark_valid(carry(out, shortened(hidden_states)), valid_of(hidden_states))

    def _mask(self, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> Tensor | None:
        """The model's mask, or this layer's own where its cache is or gets shorter."""
        entry = None if cache is None else cache.layers[self.self_attn.layer_idx]
        held = getattr(entry, "widefield_valid", None)
        if shortened(hidden_states) is None and held is None:
            return mask
        batch, length, _ = hidden_states.shape
        if held is None:
            held = _held_before(entry, mask, batch, hidden_states.device)
        valid = valid_of(hidden_states)
        if valid is None:
            valid = held.new_ones(batch, length)
        whole = torch.cat([_repeated(held, batch), valid], dim=1)
        if entry is not None:
            entry.widefield_valid = whole
        eager = self.self_attn.config._attn_implementation == "eager"
        return _causal(whole, length, hidden_states.dtype if eager else None)


def _held_before(
    entry: Any, mask: Tensor | None, batch: int, device: torch.device
) -> Bool[Tensor, "batch held"]:
    """Which tokens of a cache that has not been shortened yet are no padding: the mask knows."""
    if entry is not None and type(entry) is not DynamicLayer:
        raise WidefieldError(
            f"the attention cache is a {type(entry).__name__}, and decimamba shortens it: expected "
            "a DynamicLayer; leave out cache_implementation"
        )
    count = 0 if entry is None else entry.get_seq_length()
    if mask is None or not count:
        return torch.ones(batch, count, dtype=torch.bool, device=device)
    seen = mask[:, 0, -1, :count]
    return (seen if seen.dtype == torch.bool else seen >= 0).expand(batch, -1)


def _repeated(held: Tensor, batch: int) -> Tensor:
    """The rows of a cache that was repeated, for several answers."""
    return held if len(held) == batch else held.repeat_interleave(batch // len(held), dim=0)


def _causal(
    valid: Bool[Tensor, "batch whole"], length: int, dtype: torch.dtype | None
) -> Tensor | None:
    """Mask (B, 1, L, past + L) of the last L tokens: bool, or added to the scores if of a dtype.

    None where attention needs none. Padding sees itself, as a row that sees nothing has no softmax.
    """
    whole = valid.shape[1]
    causal_alone = length == 1 or (length == whole and dtype is None)
    if causal_alone and bool(valid.all()):
        return None
    key = torch.arange(whole, device=valid.device)
    query = key[whole - length :, None]
    visible = ((key <= query) & valid[:, None, None]) | (key == query)
    if dtype is None:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=valid.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )


SWAPS = {
    JambaMambaMixer: WidefieldJambaMambaMixer,
    JambaMambaDecoderLayer: WidefieldJambaMambaDecoderLayer,
    JambaAttentionDecoderLayer: WidefieldJambaAttentionDecoderLayer,
}


def decimation(model: nn.Module) -> str | None:
    """Why no token may be dropped, or None."""
    kind = model.config._attn_implementation  # type: ignore[union-attr]
    if kind in _MASKED:
        return None
    return (
        f"its attention is {kind}, which takes no mask that differs by layer: load it with "
        "attn_implementation='sdpa'"
    )
