"""Attention layers of hybrid models behind layers that drop tokens: masks for what is left.

transformers makes one mask a forward for all attention layers, by the cache of the first. A layer
behind dropped tokens has fewer of them, and its cache holds fewer, so that it gets a mask of its
own: the families whose attention knows no positions need nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from widefield.errors import WidefieldError
from widefield.families._context import Left, uncompiled

_FLASH = "flash_attention"


@uncompiled
def fit_mask(
    attention: Any,
    hidden_states: Float[Tensor, "batch length width"],
    left: Left | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """An attention block's keyword arguments, with the mask that its tokens need.

    Args:
        attention: the attention module.
        hidden_states: the block's input.
        left: what earlier layers have left of the tokens, where they say so.
        arguments: `attention_mask` (None, 2-D or 4-D), `past_key_values`, and whatever else.

    Raises:
        WidefieldError: where the cache cannot be shortened.
    """
    cache = arguments.get("past_key_values")
    entry = None if cache is None else cache.layers[attention.layer_idx]
    held = getattr(entry, "widefield_valid", None)
    if held is None and (left is None or not left.dropped):
        return arguments
    batch, length, _ = hidden_states.shape
    if held is None:
        held = _held_before(entry, arguments.get("attention_mask"), batch, hidden_states.device)
    valid = None if left is None else left.valid
    if valid is None:
        valid = held.new_ones(batch, length)
    whole = torch.cat([_repeated(held, batch).to(valid.device), valid], dim=1)
    if entry is not None:
        entry.widefield_valid = whole
    return {**arguments, "attention_mask": _mask(attention, whole, length, hidden_states.dtype)}


def why_no_mask(model: nn.Module) -> str | None:
    """Why a model's attention cannot be behind dropped tokens, or None."""
    kind = str(model.config._attn_implementation)  # type: ignore[union-attr]
    if kind in ("eager", "sdpa") or kind.startswith(_FLASH):
        return None
    return (
        f"its attention is {kind}, which takes no mask that differs by layer: load it with "
        "attn_implementation='sdpa'"
    )


def counted_attention(cache: Any | None) -> Any | None:
    """The entry of a cache by whose length transformers counts the tokens that it holds."""
    entries = getattr(cache, "layers", ())
    return next((e for e in entries if isinstance(e, CacheLayerMixin)), None)


def _held_before(
    entry: Any, mask: Any, batch: int, device: torch.device
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
    seen = mask[:, :count] if mask.ndim == 2 else mask[:, 0, -1, :count]
    return (seen >= 0 if seen.is_floating_point() else seen.bool()).expand(batch, -1)


def _repeated(held: Tensor, batch: int) -> Tensor:
    """The rows of a cache that was repeated, for several answers."""
    return held if len(held) == batch else held.repeat_interleave(batch // len(held), dim=0)


def _mask(
    attention: Any, valid: Bool[Tensor, "batch whole"], length: int, dtype: torch.dtype
) -> Tensor | None:
    """The mask of the last `length` tokens, in the form that this implementation reads."""
    kind = str(attention.config._attn_implementation)
    if kind.startswith(_FLASH):
        return None if bool(valid.all()) else valid
    return _causal(valid, length, dtype if kind == "eager" else None)


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
