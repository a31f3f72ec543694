"""Attention caches of one size, so that a decode step of a hybrid model can be recorded.

transformers' own makes new tensors with every token. Here keys and values lie in tensors that have
room for those to come, and a mask hides what is not there yet. With a mask transformers copies the
keys that several heads share, ten times what a step has to read. cuDNN needs no copies; where it
cannot be had, a step takes two products of matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from widefield.errors import WidefieldError

__all__ = ["Behind", "FixedAttention", "attend", "attends", "what_attention_needs"]

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
        self._eager = _kind(model) == "eager"
        dtype = keys.dtype if self._eager else torch.promote_types(keys.dtype, torch.float32)
        self._hidden = torch.finfo(dtype).min
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

    def step(self, forward: Callable[..., Any]) -> Any:
        """Run a model's forward on the token at hand, and go on to the next place.

        Args:
            forward: takes mask and positions as keywords.

        Raises:
            WidefieldError: if its attention is not torch's.
        """
        self._mask.index_fill_(3, self._place, 0.0)
        masks = {"full_attention": self._mask if self._eager else None, "linear_attention": None}
        with _Attending(self._mask) as attending:
            found = forward(attention_mask=masks, position_ids=self._positions)
        if not self._eager and attending.calls != sum(1 for _ in _filled(self.cache)):
            raise WidefieldError(
                "this model's attention does not call scaled_dot_product_attention, and cannot be "
                "recorded: leave cuda_graph out"
            )
        self._place.add_(1)
        self._positions.add_(1)
        return found

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
        held.fill_(0.0)
        if behind.valid is not None:
            held.masked_fill_(~behind.valid.to(held.device), self._hidden)

    def store(self, cache: Any, count: int) -> None:
        """Give a cache the keys and values of so many tokens more."""
        end = self._held + count
        for ours, theirs in zip(_filled(self.cache), _filled(cache), strict=True):
            theirs.keys, theirs.values = (t[:, :, :end].clone() for t in (ours.keys, ours.values))


class _Attending(TorchFunctionMode):
    """Inside, torch's attention of one query is `attend` with a mask of ours.

    Attributes:
        calls: of it so far.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask, self.calls = mask, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        self.calls += 1
        query, keys, values = args
        return attend(query, keys, values, self.mask, kwargs.get("scale"))


def attend(
    query: Float[Tensor, "batch heads 1 width"],
    keys: Float[Tensor, "batch groups held width"],
    values: Float[Tensor, "batch groups held values"],
    mask: Float[Tensor, "batch 1 1 held"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads 1 values"]:
    """Attention of one token a row over a cache that several heads may share.

    Args:
        query: of the token; heads / groups heads in a row share their keys.
        keys: of all tokens.
        values: of all tokens.
        mask: added to the scores, 0 or hardly above minus infinity.
        scale: of the scores; None for one over the root of the width.
    """
    if query.is_cuda:
        shown = mask == 0
        asked = SDPAParams(query, keys, values, shown, 0.0, False, True)
        if can_use_cudnn_attention(asked):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(
                    query, keys, values, attn_mask=shown, scale=scale, enable_gqa=True
                )
    return _in_two_products(query, keys, values, mask, scale)


def _in_two_products(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """The same, with scores in the mask's dtype."""
    batch, heads, _, width = query.shape
    groups, held = keys.shape[1:3]
    rows = query.reshape(batch * groups, heads // groups, width)
    flat, rest = keys.reshape(batch * groups, held, width), values.flatten(0, 1)
    if mask.dtype == query.dtype:
        scores = torch.bmm(rows, flat.mT)
    elif query.is_cuda:
        scores = torch.bmm(rows, flat.mT, out_dtype=mask.dtype)
    else:
        scores = torch.bmm(rows.to(mask.dtype), flat.mT.to(mask.dtype))
    scores = scores.view(batch, groups, -1, held)
    scores = torch.add(mask, scores, alpha=width**-0.5 if scale is None else scale)
    weights = scores.softmax(-1).to(values.dtype).flatten(0, 1)
    return torch.bmm(weights, rest).view(batch, heads, 1, -1)


def _filled(cache: Any) -> Iterator[Any]:
    """The entries of attention that hold something."""
    for entry in cache.layers:
        if isinstance(entry, DynamicLayer) and getattr(entry, "keys", None) is not None:
            yield entry
