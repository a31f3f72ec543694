"""Read a long prompt in chunks: the same answer as in one pass, in memory that does not grow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from widefield import families
from widefield.errors import WidefieldError
from widefield.families import ChunkedPrefill, LayerCache, Padding, read_padding

__all__ = ["cache_name", "in_chunks", "prefill"]

Progress = Callable[[int, int], None]
Replayed = Callable[[Any, Any, ChunkedPrefill, int], AbstractContextManager[Any]]


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor,
    *,
    chunk_size: int = 65536,
    attention_mask: Tensor | None = None,
    context_length: int | None = None,
    cache: Any | None = None,
    progress: Progress | None = None,
    cuda_graph: bool = False,
) -> Any:
    """Read a prompt in chunks into a cache, as exactly as in one pass.

    What is held in memory at a time is one chunk, the states, and the tokens that a decimating
    layer may keep; attention layers of hybrid models keep their keys and values, as ever.

    Args:
        model: an extended model with a language-model head.
        input_ids: (B, L) token ids, on any device.
        chunk_size: tokens of each row that are read at a time. The result does not depend on it.
        attention_mask: (B, L), or (B, past + L) where a cache is given; 1 for tokens, 0 for left
            padding. None = no padding.
        context_length: S that methods plan for, in tokens, where more than this prompt is to come;
            None for what the cache holds and the prompt together. At least as much as that.
        cache: a transformers cache to continue from, filled in place; None for a new one.
        progress: called after each chunk with the tokens of a row read so far and those in all.
        cuda_graph: record a chunk once on a GPU and replay it for all others of its length, in this
            prompt and in later ones. The same numbers, sooner where launching kernels takes
            longest: short chunks of small models. What is left over, and chunks with padding, run
            as without. For models whose cache does not grow, and methods that keep all tokens.

    Returns:
        The model's own output: `.logits` (B, 1, V) of the last token, and the filled cache as
        `.cache_params` or `.past_key_values`, whichever the model calls it, from which decoding,
        `generate()` or a second turn can go on.

    Raises:
        WidefieldError: if the model is not extended, has no head, an argument is out of range, or a
            graph is asked for where there can be none.
    """
    if "widefield" not in model.__dict__:
        raise WidefieldError(
            f"this {type(model).__name__} is not extended, and stock models forget their state "
            "between chunks: call wf.extend(model) first"
        )
    if "logits_to_keep" not in _parameters(model):
        raise WidefieldError(
            f"{type(model).__name__} has no language-model head: expected a causal model, e.g. "
            "MambaForCausalLM"
        )
    _check_ids(input_ids)
    inputs = {"input_ids": input_ids, "use_cache": True, cache_name(model): cache}
    inputs |= _masks(model, attention_mask, input_ids, cache)
    return in_chunks(
        model,
        inputs,
        chunk_size,
        context_length=context_length,
        progress=progress,
        replayed=model.__dict__["widefield"].recordings.replayed if cuda_graph else None,
    )


def in_chunks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    chunk_size: int,
    *,
    context_length: int | None = None,
    progress: Progress | None = None,
    replayed: Replayed | None = None,
) -> Any:
    """Call an extended model with one chunk of its arguments after the other.

    Args:
        model: an extended model.
        inputs: the arguments of a forward over the whole prompt, as `generate()` prepares them.
        chunk_size: tokens of each row a call.
        context_length: as in `prefill`.
        progress: as in `prefill`.
        replayed: gives what is called in place of the model for the length of the prefill, from the
            model, the prefill and the tokens of a chunk; None = the model itself.

    Returns:
        The output of the last call.

    Raises:
        WidefieldError: if an argument is out of range or cannot be cut into chunks.
    """
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise WidefieldError(f"chunk size {chunk_size!r}: expected tokens, at least 1")
    _check_inputs(inputs)
    if replayed is None:
        _check_model(model)  # what was recorded is only replayed by the model as it was
    arguments = {**inputs, "return_dict": True}
    if "logits_to_keep" in _parameters(model):
        arguments["logits_to_keep"] = 1
    length = _tokens(arguments).shape[1]
    if length == 1 and context_length is None:
        return model(**arguments)  # behind a filled cache it is a decode step, as ever
    cache: Any = arguments.get(cache_name(model))
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))  # type: ignore
        arguments[cache_name(model)] = cache
    padding = read_padding(arguments.get("attention_mask"), length)
    new = _announced(model, cache, padding, _tokens(arguments).shape[0], context_length)
    chunked = ChunkedPrefill(new, padding)
    outputs, size = None, min(chunk_size, length)
    with _announcing(cache, chunked), (replayed or _itself)(model, cache, chunked, size) as forward:
        for start in range(0, length, chunk_size):
            part = slice(start, min(start + chunk_size, length))
            chunked.padding, chunked.last = _part(padding, part), part.stop == length
            outputs = forward(**_chunk(model, arguments, part, length))
            if progress is not None:
                progress(part.stop, length)
    return outputs


def _itself(
    model: Any, cache: Any, chunked: ChunkedPrefill, size: int
) -> AbstractContextManager[Any]:
    return nullcontext(model)


@contextmanager
def _announcing(cache: Any, chunked: ChunkedPrefill) -> Iterator[None]:
    """Let the layers see on the cache that a prefill comes in chunks."""
    cache.widefield_prefill = chunked
    try:
        yield
    finally:
        del cache.widefield_prefill


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return _parameters_of(getattr(model.forward, "__func__", model.forward))


@functools.lru_cache(maxsize=64)
def _parameters_of(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of a function; to read them takes longer than to launch a recorded prefill."""
    return inspect.signature(forward).parameters


def cache_name(model: nn.Module) -> str:
    """What the model calls its cache, as an argument and in its outputs."""
    return "cache_params" if "cache_params" in _parameters(model) else "past_key_values"


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids is None else ids


def _check_ids(input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids)
        raise WidefieldError(f"input_ids is {shape}: expected a tensor of shape (batch, length)")
    if input_ids.shape[1] == 0:
        raise WidefieldError("the prompt is empty: expected at least one token")


def _check_model(model: nn.Module) -> None:
    theirs = families.swaps()
    for module in model.modules():
        if type(module) in theirs and hasattr(module, "A_log"):
            raise WidefieldError(
                f"{type(module).__name__} layers that came after wf.extend(model) forget their "
                "state between chunks: call wf.extend(model) again"
            )


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    if inputs.get("use_cache") is False:
        raise WidefieldError("a prefill in chunks needs a cache: leave out use_cache=False")
    if isinstance(inputs.get("attention_mask"), Mapping):
        raise WidefieldError(
            "a prefill in chunks needs a 2-D attention mask, and a static cache makes others: "
            "leave out cache_implementation"
        )


def _masks(
    model: nn.Module, mask: Tensor | None, ids: Tensor, cache: Any | None
) -> dict[str, Tensor]:
    """The mask over all that the cache holds and the prompt, and the positions that follow.

    Positions are always given: some models count them from 0 in every call that has none.
    """
    length, past, found = ids.shape[1], _attended(cache), {}
    if mask is not None:
        read_padding(mask, length)
        if mask.shape[1] == length and past:
            mask = torch.cat([mask.new_ones(mask.shape[0], past), mask], dim=1)
        found["attention_mask"] = mask
    if "position_ids" not in _parameters(model):
        return found
    if mask is None:
        places = torch.arange(past, past + length, device=ids.device).expand(ids.shape[0], -1)
    else:
        places = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    return found | {"position_ids": places}


def _attended(cache: Any | None) -> int:
    """Tokens that the attention layers of a cache hold; 0 where there are none."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except ValueError:  # transformers has no other word for a cache without attention
        return 0


def _announced(
    model: nn.Module, cache: Any, padding: Padding, batch: int, context_length: int | None
) -> tuple[int, ...]:
    """The tokens of each row that methods are to plan for, on top of what the cache holds."""
    if context_length is None:
        return padding.lengths
    layer, _ = next(families.mixers(model))
    seen = LayerCache(cache, layer, batch).seen
    if seen is None:
        raise WidefieldError(
            f"context_length={context_length}: the cache was filled before the model was extended, "
            "so nobody knows what it holds; leave context_length out or prefill a new cache"
        )
    new = tuple(context_length - count for count in seen)
    width = max(len(new), len(padding.lengths))
    for ahead, here in zip(_wide(new, width), _wide(padding.lengths, width), strict=True):
        if ahead < here:
            raise WidefieldError(
                f"context_length={context_length}: expected at least the "
                f"{context_length - ahead + here} tokens of the cache and the prompt together"
            )
    return new


def _wide(values: tuple[int, ...], width: int) -> tuple[int, ...]:
    return values * width if len(values) == 1 else values


def _part(padding: Padding, part: slice) -> Padding:
    """The padding of a chunk; its rows may have no token in it yet."""
    if padding.valid is None:
        return Padding.none(part.stop - part.start)
    valid = padding.valid[:, part]
    return Padding.of_valid(None if bool(valid.all()) else valid, part.stop - part.start)


def _chunk(
    model: nn.Module, arguments: Mapping[str, Any], part: slice, length: int
) -> dict[str, Any]:
    """The arguments of one chunk's forward."""
    device = next(model.parameters()).device
    chunk = dict(arguments)
    for name in ("input_ids", "inputs_embeds"):
        if chunk.get(name) is not None:
            chunk[name] = chunk[name][:, part].to(device)
    if chunk.get("position_ids") is not None:
        chunk["position_ids"] = chunk["position_ids"][..., part].to(device)
    mask = chunk.get("attention_mask")
    if mask is not None:
        chunk["attention_mask"] = mask[:, : mask.shape[1] - length + part.stop].to(device)
    return chunk
