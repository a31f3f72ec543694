"""What a mixer needs beside its weights: padding, the cache, and its layer's plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import LinearAttentionLayer

from widefield.errors import WidefieldError
from widefield.ops import Rows, Survivors
from widefield.plan import LayerPlan, ModelLayout, Pool, ScanInputs, SSDInputs

Function = TypeVar("Function", bound=Callable[..., Any])
Observer = Callable[[int, ScanInputs | SSDInputs], None]


def uncompiled(function: Function) -> Function:
    """The same function, which torch.compile runs as it is.

    Kernels of our own are none that it could compile, and Python objects go between layers.
    """
    return torch.compiler.disable(function)  # type: ignore[return-value]


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]:
        return False
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        return False
    return not (_has_any_global_hook() or own["_backward_pre_hooks"] or is_compiling())


class _Derived:
    """What was made of a weight, and which weight that was; copies of a model start without it."""

    def __init__(self, weight: Tensor, value: Tensor) -> None:
        # The alias keeps the memory, so that no other weight can come to lie where this one was.
        self.weight, self.alias, self.version = weight, weight.detach(), weight._version
        self.value = value

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight is still what it was."""
        return (
            self.weight is weight
            and self.version == weight._version
            and self.alias.data_ptr() == weight.data_ptr()
            and self.alias.dtype == weight.dtype
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def derived(
    module: nn.Module, name: str, weight: Tensor, make: Callable[[Tensor], Tensor]
) -> Tensor:
    """What `make` makes of a weight, kept in a module until the weight changes.

    In training it is made anew each time, and so is what has no version to be known by.
    """
    if module.training or torch.is_grad_enabled() or weight.is_inference():
        return make(weight)
    known = module.__dict__.setdefault("_widefield_derived", {})
    kept = known.get(name)
    if kept is not None and kept.fits(weight):
        return kept.value
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(weight)  # what is being recorded has no values yet
    with torch.inference_mode(False), torch.no_grad():
        kept = _Derived(weight, make(weight))
    if weight.is_cuda:
        torch.cuda.current_stream(weight.device).synchronize()  # other streams will read it, too
    known[name] = kept
    return kept.value


class Link(Protocol):
    """How a mixer asks what to do; the extension puts one into every mixer of its model."""

    observer: Observer | None
    layout: ModelLayout

    def plan(
        self, layer: int, seen: tuple[int, ...] | None, new: tuple[int, ...], device: torch.device
    ) -> LayerPlan | None:
        """The plan of this layer for a prefill of `new` tokens a row after `seen` ones."""
        ...


@dataclass(frozen=True, slots=True)
class Padding:
    """Left padding of a batch.

    Attributes:
        valid: (B, L) bool, or None if no token is padding.
        lengths: valid tokens of each row; one number if all rows have as many.
    """

    valid: Bool[Tensor, "batch length"] | None
    lengths: tuple[int, ...]

    @staticmethod
    def none(length: int) -> Padding:
        """No padding at all."""
        return Padding(None, (length,))

    @staticmethod
    def of_valid(valid: Bool[Tensor, "batch length"] | None, length: int) -> Padding:
        """From a tensor that is known to be left-padded."""
        if valid is None:
            return Padding.none(length)
        return Padding(valid, collapse(tuple(int(n) for n in valid.sum(1).tolist())))


def collapse(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """One number where all rows agree."""
    return lengths[:1] if len(set(lengths)) == 1 else lengths


def read_padding(mask: Tensor | None, length: int) -> Padding:
    """Read a 2-D attention mask; left padding only.

    The answer is kept on the mask tensor, so that the layers of one forward check it once.

    Args:
        mask: (B, L) or (B, past + L), 1 for tokens and 0 for padding; None = no padding.
        length: L, the tokens of this forward.

    Raises:
        WidefieldError: if the mask is not 2-D, is shorter than the tokens, has a row without a
            token, holes,
            or padding on the right.
    """
    if mask is None:
        return Padding.none(length)
    known = getattr(mask, "_widefield_padding", None)
    if known is not None and known[0] == (length, mask._version):
        return known[1]
    if mask.ndim != 2:
        raise WidefieldError(
            f"attention_mask has shape {tuple(mask.shape)}: expected (batch, length) with 1 "
            "for tokens "
            "and 0 for left padding"
        )
    check_covers(mask, length)
    padding = _check_left_padded(mask[:, -length:].bool(), length)
    # A tensor that takes no attributes is read again by the next layer.
    with suppress(AttributeError, RuntimeError):
        mask._widefield_padding = ((length, mask._version), padding)  # type: ignore[attr-defined]
    return padding


def check_covers(mask: Tensor, length: int) -> None:
    """Raise unless a 2-D mask has an entry for each of `length` tokens; some models cut it first.

    Raises:
        WidefieldError: naming both lengths.
    """
    if mask.shape[1] < length:
        raise WidefieldError(
            f"attention_mask covers {mask.shape[1]} tokens, the input has {length}: pass one "
            "entry a token"
        )


def _check_left_padded(valid: Bool[Tensor, "batch length"], length: int) -> Padding:
    if bool(valid.all()):
        return Padding.none(length)
    falls = (valid[:, :-1] & ~valid[:, 1:]).any(1)
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        what = "is right-padded" if not bool(valid[row, -1]) else "has a hole"
        raise WidefieldError(
            f"attention_mask {what} in row {row}: a state-space model carries padding on in "
            "its state; "
            "pad on the left (tokenizer.padding_side = 'left')"
        )
    if not bool(valid[:, -1].all()):
        row = int((~valid[:, -1]).nonzero()[0])
        raise WidefieldError(
            f"row {row} of attention_mask has no token: expected at least one a row"
        )
    return Padding.of_valid(valid, length)


@dataclass(slots=True)
class ChunkedPrefill:
    """A prefill that comes in chunks; it lies on the cache as long as it lasts.

    Attributes:
        new: tokens of each row in all chunks together (and in what is announced to follow them);
            one number if equal.
        padding: of the current chunk; a row may have no token in it yet.
        last: whether the current chunk is the last.
        seen: by layer, what it had consumed before the first chunk.
        survivors: by decimating layer, what it may keep of the chunks so far.
        recorded: the plans, by layer, where a chunk is run to be recorded: nothing may wait for the
            GPU then, and whoever replays it answers for the state; else None.
    """

    new: tuple[int, ...]
    padding: Padding
    last: bool = False
    seen: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    survivors: dict[int, Survivors] = field(default_factory=dict)
    recorded: dict[int, LayerPlan | None] | None = None


class LayerCache:
    """One layer's part of a transformers cache, and how many tokens it has consumed."""

    def __init__(self, cache: Any, layer: int, batch: int) -> None:
        """Look at layer number `layer` of `cache`; `batch` rows are about to be read."""
        self.cache, self.layer, self.batch = cache, layer, batch
        self.chunked: ChunkedPrefill | None = getattr(cache, "widefield_prefill", None)
        self.entry = cache.layers[layer]
        if getattr(self.entry, "record_past", False):
            raise WidefieldError(
                "assisted decoding asks the cache to roll back, which a recurrent state cannot: "
                "call generate() without an assistant model or prompt lookup"
            )
        self.filled = bool(self.entry.has_previous_state[0])
        # The kernels read the cache by the rows of the input.
        rows = self.entry.conv_states[0].shape[0] if self.filled else batch
        if rows != batch:
            raise WidefieldError(
                f"the cache holds {rows} row{'s' * (rows != 1)}, the input has {batch}: give one "
                "row of input for each, or repeat the rows of the cache with "
                "wf.fork_state(cache, times)"
            )

    @property
    def conv_state(self) -> Float[Tensor, "batch channels kernel"] | None:
        """The last K inputs of the convolution, or None before the first token."""
        return self.entry.conv_states[0] if self.filled else None

    @property
    def state(self) -> Tensor | None:
        """The recurrent state, or None before the first token."""
        return self.entry.recurrent_states[0] if self.filled else None

    @property
    def seen(self) -> tuple[int, ...] | None:
        """Tokens each row has consumed, one number if equal; None if not known."""
        if self.chunked is not None and self.layer in self.chunked.survivors:
            return self.chunked.seen[self.layer]  # what is held back is not consumed yet
        if not self.filled:
            return (0,)
        seen = getattr(self.entry, "widefield_seen", None)
        if seen is None or len(seen) in (1, self.batch):
            return seen
        if self.batch % len(seen) == 0:  # rows were repeated, for beams or several answers
            times = self.batch // len(seen)
            return tuple(n for n in seen for _ in range(times))
        return None

    @property
    def seen_before(self) -> tuple[int, ...] | None:
        """The same before this prefill, whichever of its chunks is at hand."""
        if self.chunked is None:
            return self.seen
        return self.chunked.seen.setdefault(self.layer, self.seen)

    def decodes(self, length: int, dropped: bool) -> bool:
        """Whether the `length` tokens at hand are a decode step, and not a prefill."""
        return self.filled and length == 1 and self.chunked is None and not dropped

    @property
    def is_recorded(self) -> bool:
        """Whether the forward at hand is run to be recorded."""
        return self.chunked is not None and self.chunked.recorded is not None

    def more_to_come(self, dropped: bool) -> bool:
        """Whether later chunks of this prefill reach this layer; behind a decimation none do."""
        return self.chunked is not None and not self.chunked.last and not dropped

    def survivors(self, pool: Pool) -> Survivors:
        """What this layer may keep of the prefill at hand, earlier chunks included."""
        if self.chunked is None:
            return Survivors(pool)
        self.chunked.seen.setdefault(self.layer, self.seen)
        return self.chunked.survivors.setdefault(self.layer, Survivors(pool))

    def store_conv(self, conv_state: Tensor) -> None:
        """Write the last K inputs alone, where the tokens themselves are held back."""
        if self.filled:
            self.entry.conv_states[0].copy_(conv_state)
        elif not self._adopted(conv_state, None):
            self.cache.update_conv_state(conv_state, self.layer)

    def store(
        self, conv_state: Tensor, state: Tensor | None, new: tuple[int, ...] | None = None
    ) -> None:
        """Write the states behind the last token, in place where the cache already has some.

        Args:
            conv_state: (B, D, K) the last K inputs.
            state: the recurrent state, or None if it was updated in place.
            new: tokens of each row that this forward consumed.
        """
        seen = self.seen
        self.store_conv(conv_state)
        if state is not None and not self._adopted(None, state):
            self.cache.update_recurrent_state(state, self.layer)
        self.entry.widefield_seen = None if seen is None or new is None else _add(seen, new)

    def _adopted(self, conv_state: Tensor | None, state: Tensor | None) -> bool:
        """Whether an empty entry has taken a new tensor as it is, in place of a copy of it."""
        entry = self.entry
        if torch.is_grad_enabled() or not isinstance(entry, LinearAttentionLayer):
            return False
        if conv_state is not None and not entry.is_conv_states_initialized[0]:
            entry.dtype, entry.device = entry.dtype or conv_state.dtype, conv_state.device
            entry.conv_kernel_size[0] = conv_state.shape[-1]
            entry.conv_states[0] = conv_state
            entry.is_conv_states_initialized[0] = entry.has_previous_state[0] = True
            return True
        if state is not None and not entry.is_recurrent_states_initialized[0]:
            entry.recurrent_states[0] = state
            entry.is_recurrent_states_initialized[0] = True
            return True
        return False

    def count(self, new: int) -> None:
        """Note that every row has consumed `new` more tokens."""
        seen = self.seen
        self.entry.widefield_seen = None if seen is None else _add(seen, (new,))


def _add(seen: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    width = max(len(seen), len(new))
    left = seen * width if len(seen) == 1 else seen
    right = new * width if len(new) == 1 else new
    return collapse(tuple(a + b for a, b in zip(left, right, strict=True)))


@dataclass(frozen=True, slots=True)
class Left:
    """Rides on a hidden-state tensor: which of its rows are tokens, and whether there were more.

    Attributes:
        valid: (B, k) False where a row is padding, or None if none is.
        dropped: whether earlier layers have dropped tokens in this forward.
    """

    valid: Bool[Tensor, "batch left"] | None
    dropped: bool = False

    def to(self, device: Any, non_blocking: bool = False) -> Left:
        """The same on another device: accelerate moves every argument that can be moved."""
        if self.valid is None:
            return self
        return Left(self.valid.to(device, non_blocking=non_blocking), self.dropped)


def left_of(hidden_states: Tensor) -> Left | None:
    """What earlier layers have left of the tokens, where a block has marked it."""
    return getattr(hidden_states, "_widefield_left", None)


def mark_left(hidden_states: Tensor, left: Left | None) -> Tensor:
    """Leave a mark on a hidden-state tensor for the next block."""
    if left is not None:
        hidden_states._widefield_left = left  # type: ignore[attr-defined]
    return hidden_states


def padding_of(
    hidden_states: Tensor,
    mask: Tensor | None,
    left: Left | None,
    past: LayerCache | None = None,
) -> Padding:
    """Padding of a block's input, whether or not earlier layers dropped tokens."""
    length = hidden_states.shape[1]
    if left is not None and left.dropped:
        return Padding.of_valid(left.valid, length)
    if past is not None and past.chunked is not None:
        return past.chunked.padding
    return read_padding(mask, length)


def plan_of(
    link: Link,
    layer: int,
    past: LayerCache | None,
    padding: Padding,
    dropped: bool,
    device: torch.device,
) -> LayerPlan | None:
    """The plan of a layer for the prefill at hand; of all its chunks, where it comes in chunks.

    Behind a decimating layer all that was kept comes at once, with the last chunk.
    """
    if past is None:
        return link.plan(layer, (0,), padding.lengths, device)
    if past.chunked is not None and past.chunked.recorded is not None:
        return past.chunked.recorded[layer]
    if past.chunked is None or dropped:
        return link.plan(layer, past.seen, padding.lengths, device)
    return link.plan(layer, past.seen_before, past.chunked.new, device)


def check_finite(state: Tensor, layer: int) -> None:
    """Refuse a state behind a scan that is not finite.

    Raises:
        WidefieldError: naming the likely causes.
    """
    if not bool(torch.isfinite(state).all()):
        raise WidefieldError(
            f"layer {layer}: the state is not finite after the scan (non-finite Δ "
            "or input); check the model's weights and its dtype (float32 is safest)"
        )


def check_whole(past: LayerCache | None, layer: int) -> None:
    """Refuse a prefill in chunks where a layer has to know all tokens before it answers for any.

    Raises:
        WidefieldError: if the prefill at hand comes in chunks.
    """
    if past is not None and past.chunked is not None:
        raise WidefieldError(
            f"layer {layer}: DeciMamba(residual='full') answers for every token, and which are "
            "kept is known at the end of the prompt only: prefill it in one pass, or leave out "
            "residual='full'"
        )


def scattered(
    rows: Rows, kept: Float[Tensor, "batch kept features"], length: int
) -> Float[Tensor, "batch length features"]:
    """Kept rows back in their places of a sequence of `length` tokens, zeros in all others."""
    index = rows.index[..., None].expand_as(kept)
    whole = kept.new_zeros(kept.shape[0], length, kept.shape[2])
    return whole.scatter(1, index, kept)
