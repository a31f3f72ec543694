"""Attention caches of one size, so that a decode step of a hybrid model can be recorded.

transformers' own makes new tensors with every token. Here keys and values lie in tensors that have
room for those to come, and a mask hides what is not there yet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

__all__ = ["Behind", "FixedAttention", "attends", "what_attention_needs"]

_BLOCK = 256  # tokens: prompts of nearly one length share a recorded step
_ENTRIES = ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DynamicLayer")
_NO_ENTRY = "DummyLayer"  # of blocks without a cache, in newer versions of transformers
_KINDS = ("eager", "sdpa")


@dataclass(frozen=True)
class Behind:
    """What a decode step stands behind.

    Attributes:
        valid: (B, held) bool, False where the cache holds padding; None if nowhere.
        positions: (B,) of the next token of each row.
        new: tokens a row that may come.
    """

    valid: Bool[Tensor, "batch held"] | None
    positions: Int[Tensor, " batch"]
    new: int


def attends(cache: Any) -> bool:
    """Whether any entry of a cache, filled or not, is one of attention."""
    return any(isinstance(entry, DynamicLayer) for entry in cache.layers)


def what_attention_needs(model: nn.Module, cache: Any) -> str | None:
    """What a model with this cache lacks for its attention to be recorded, or None."""
    for entry in cache.layers:
        if type(entry).__name__ not in (*_ENTRIES, _NO_ENTRY):
            return f"a cache that holds every token, and this one has a {type(entry).__name__}"
    kind = _kind(model)
    if kind not in _KINDS:
        return f"attention that takes a mask, and this is {kind}: load it with 'sdpa'"
    return None


def _kind(model: Any) -> str:
    return str(model.config._attn_implementation)


class _InPlace(DynamicLayer):
    """Writes the newest keys and values where its owner says."""

    widefield_place: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put those of one token into their place; all of the tensors are returned."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.widefield_place, key_states)
        self.values.index_copy_(2, self.widefield_place, value_states)
        return self.keys, self.values


class _InPlaceBeside(_InPlace, LinearAttentionAndFullAttentionLayer):
    """The same beside the states of a Mamba layer."""


_FIXED: dict[type, type] = {
    DynamicLayer: _InPlace,
    LinearAttentionAndFullAttentionLayer: _InPlaceBeside,
}


class FixedAttention:
    """The attention of a cache of one size.

    Attributes:
        cache: a copy of the cache it was made for, with room in its entries.
        room: tokens that it can hold.
    """

    def __init__(self, model: nn.Module, cache: Any, room: int) -> None:
        """Nothing is held yet.

        Args:
            model: whose attention reads the mask.
            cache: filled, for the shapes.
            room: from `room_for`.
        """
        self.room = room
        wide = {
            id(tensor): tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
            for entry in _filled(cache)
            for tensor in (entry.keys, entry.values)
        }
        self.cache = copy.deepcopy(cache, dict(wide))
        keys: Tensor = next(_filled(self.cache)).keys
        self._place = torch.zeros(1, dtype=torch.long, device=keys.device)
        self._positions = torch.zeros(len(keys), 1, dtype=torch.long, device=keys.device)
        dtype = keys.dtype if _kind(model) == "eager" else torch.bool
        self._hidden, self._shown = (torch.finfo(dtype).min, 0.0) if dtype != torch.bool else (0, 1)
        shape = (len(keys), 1, 1, room)
        self._mask = torch.full(shape, self._hidden, dtype=dtype, device=keys.device)
        self._held = 0
        for entry in _filled(self.cache):
            entry.__class__ = _FIXED[type(entry)]
            entry.widefield_place = self._place

    @staticmethod
    def room_for(cache: Any, new: int) -> int:
        """Tokens that a cache and so many more take, rounded up; 0 if it has no attention."""
        lengths = [entry.keys.shape[2] for entry in _filled(cache)]
        return -(-(max(lengths) + new) // _BLOCK) * _BLOCK if lengths else 0

    def arguments(self) -> dict[str, Any]:
        """What the model's forward gets for the token at hand; it shows in the mask from now on."""
        self._mask.index_fill_(3, self._place, self._shown)
        masks = {"full_attention": self._mask, "linear_attention": None}
        return {"attention_mask": masks, "position_ids": self._positions}

    def advance(self) -> None:
        """Go on to the next token."""
        self._place.add_(1)
        self._positions.add_(1)

    def load(self, cache: Any, behind: Behind) -> None:
        """Stand behind what a cache holds."""
        for ours, theirs in zip(_filled(self.cache), _filled(cache), strict=True):
            self._held = theirs.keys.shape[2]
            for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                mine[:, :, : self._held].copy_(other)
                mine[:, :, self._held :].zero_()  # what is hidden must not be NaN, either
        self._place.fill_(self._held)
        self._positions.copy_(behind.positions[:, None])
        self._mask.fill_(self._hidden)
        held = self._mask[:, 0, 0, : self._held]
        held.fill_(self._shown)
        if behind.valid is not None:
            held.masked_fill_(~behind.valid.to(held.device), self._hidden)

    def store(self, cache: Any, count: int) -> None:
        """Give a cache the keys and values of so many tokens more."""
        end = self._held + count
        for ours, theirs in zip(_filled(self.cache), _filled(cache), strict=True):
            theirs.keys, theirs.values = (t[:, :, :end].clone() for t in (ours.keys, ours.values))


def _filled(cache: Any) -> Iterator[Any]:
    """The entries of attention that hold something."""
    for entry in cache.layers:
        if isinstance(entry, DynamicLayer) and getattr(entry, "keys", None) is not None:
            yield entry
