"""Attention layers of hybrid models behind layers that drop tokens: masks for what is left.

transformers makes one mask a forward, for all tokens. An attention layer behind dropped tokens has
fewer, and its cache holds fewer. Of every prefill these are as many as were kept, valid ones last;
so the last rows and, of each turn's columns, the last ones are the mask of the kept tokens: they
are as causal among themselves, and left padding of a short row stays left of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from widefield.errors import WidefieldError
from widefield.families._context import Shortened

# Of each turn: its tokens, and how many of them reached this layer.
Turns = tuple[tuple[int, int], ...]


def fit_attention(
    layer: int, kept: int, note: Shortened | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """An attention block's keyword arguments, with the mask that its tokens need.

    Args:
        layer: the block's index.
        kept: tokens that reach it in this forward.
        note: the decimation that earlier layers did in this forward, or None.
        arguments: `attention_mask` (None, 2-D or 4-D), `past_key_values`, and whatever else.

    Raises:
        WidefieldError: where transformers' mask cannot be right (see the message).
    """
    cache = arguments.get("past_key_values")
    entry = None if cache is None else cache.layers[layer]
    turns: Turns | None = getattr(entry, "widefield_turns", None)
    if note is None and turns is None:
        return arguments
    if turns is None:
        past = 0 if entry is None else int(entry.get_seq_length())
        turns = ((past, past),)
    turns = _with_turn(turns, kept if note is None else note.length, kept)
    if entry is not None:
        entry.widefield_turns = turns
    mask = arguments.get("attention_mask")
    if mask is None:
        return arguments
    if not isinstance(mask, Tensor):
        raise WidefieldError(
            f"layer {layer}: attention behind dropped tokens cannot use a {type(mask).__name__}: "
            "load the model with attn_implementation='sdpa'"
        )
    if _hides_padding(mask) and (_is_first(cache, layer) or mask.shape[-1] != _full(turns)):
        raise WidefieldError(
            f"layer {layer} is the model's first attention layer, and DeciMamba drops tokens "
            "before it: the masks of a left-padded batch or a static cache would not fit; decimate "
            "behind it, give prompts of one length, or choose residual='full'"
        )
    return {**arguments, "attention_mask": _fit(mask, turns, kept)}


def _with_turn(turns: Turns, full: int, kept: int) -> Turns:
    """One turn more; where no token was dropped it is as if the last turn had been longer."""
    if full != kept:
        return (*turns, (full, kept))
    (last_full, last_kept) = turns[-1]
    return (*turns[:-1], (last_full + full, last_kept + kept))


def _full(turns: Turns) -> int:
    return sum(full for full, _ in turns)


def _is_first(cache: Any | None, layer: int) -> bool:
    """Whether transformers makes later masks by this layer's length."""
    if cache is None:
        return False
    return layer == next(i for i, e in enumerate(cache.layers) if isinstance(e, CacheLayerMixin))


def _hides_padding(mask: Tensor) -> bool:
    """Whether the last token, which no future is hidden from, cannot see all tokens."""
    seen = mask if mask.ndim == 2 else mask[:, :, -1]
    seen = seen == 0 if seen.is_floating_point() else seen.bool()
    return not bool(seen.all())


def _fit(mask: Tensor, turns: Turns, kept: int) -> Tensor:
    """The rows and columns of a mask that the tokens of a shortened layer have."""
    if mask.shape[-1] == _full(turns):
        ends = torch.tensor([full for full, _ in turns]).cumsum(0).tolist()
        spans = [torch.arange(end - own, end) for end, (_, own) in zip(ends, turns, strict=True)]
        columns = torch.cat(spans).to(mask.device)
    else:
        columns = torch.arange(mask.shape[-1], device=mask.device)[-sum(own for _, own in turns) :]
    fitted = mask.index_select(-1, columns)
    return fitted if fitted.ndim == 2 else fitted[:, :, -kept:]
