"""What a model has read, kept: write a cache to disk, read it again, split it into several.

The state of a Mamba model has one size whatever it has read, so that a book read once can be asked
about again and again.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from widefield.errors import WidefieldError
from widefield.families import weights_fingerprint

__all__ = ["fork_state", "load_state", "save_state"]

_KEY = "widefield.state"
_FORMAT = 1
_AGAIN = "save the state again with wf.save_state"
_SEEN = "widefield_seen"
_VALID = "widefield_valid"  # which tokens a layer behind dropped ones holds; others hold all
# Entries with attention whose keys and values are all that they keep.
_GROWING = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def save_state(cache: Cache, path: str | Path, model: nn.Module) -> None:
    """Write what a model has read into one safetensors file, whole or not at all.

    Args:
        cache: `cache_params` or `past_key_values` of the model's output, any batch size.
        path: of the file; its folder must exist.
        model: the model that filled the cache, extended or not.

    Raises:
        WidefieldError: if the cache is empty or of a kind that cannot be kept, or the file cannot
            be written.
    """
    layers = _layers(cache)
    tensors = {n: t.detach().cpu().contiguous() for n, t in _flat(layers).items()}
    header = {
        "format": _FORMAT,
        "model_class": type(model).__name__,
        "fingerprint": weights_fingerprint(model),
        "dtype": _dtype(model),
        "methods": repr(getattr(model, "widefield", "not extended")),
        "seen": {str(index): _seen(cache, index) for index in layers},
    }
    _write_whole(Path(path), tensors, {_KEY: json.dumps(header)})


def load_state(path: str | Path, model: nn.Module) -> DynamicCache:
    """A cache that the model goes on from, as if it had just read what `save_state` kept.

    Give it to `model(..., cache_params=...)` and `model.generate(..., cache_params=...)`; hybrids
    with attention call it `past_key_values`.

    Args:
        path: of the file.
        model: with the weights and the dtype that the state was saved with; the cache is put on
            its device.

    Raises:
        WidefieldError: if there is no such file, it is damaged or something else, or belongs to
            another model or dtype.
    """
    path = Path(path)
    header, tensors = _read(path, model)
    _check_model(path, header, model)
    expected = _flat(_layers(_template(model)))
    if not _fits(header, tensors, expected):
        raise WidefieldError(f"{path} is not a whole state (its tensors): {_AGAIN}")
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    for name in sorted(tensors):
        _put(cache, name, tensors, expected)
    for index, seen in header["seen"].items():
        if seen is not None:
            setattr(cache.layers[int(index)], _SEEN, tuple(seen))
    return cache


def fork_state(cache: Cache, times: int = 1) -> Cache:
    """An independent copy of a cache; the one that is given stays as it is.

    Args:
        cache: `cache_params` or `past_key_values` of a model's output, with B rows.
        times: how often to repeat each row. The copy has B · times rows, those of one row next to
            each other, as `num_return_sequences` and beam search expect them.

    Raises:
        WidefieldError: if the cache is empty or of a kind that cannot be copied, or `times` is
            less than 1.
    """
    if times < 1:
        raise WidefieldError(f"times={times}: expected a whole number of at least 1")
    _layers(cache)
    forked = copy.copy(cache)
    forked.layers = [_repeated(entry, times) for entry in cache.layers]
    return forked


def _layers(cache: Cache) -> dict[int, dict[str, Tensor]]:
    """The tensors of every layer that holds some, by layer and then by name."""
    if not isinstance(cache, Cache):
        raise WidefieldError(
            f"{type(cache).__name__} is not a cache: expected cache_params or past_key_values of "
            "an output of model(..., use_cache=True)"
        )
    found = {index: _held(entry, index) for index, entry in enumerate(cache.layers)}
    found = {index: held for index, held in found.items() if held}
    if not found:
        raise WidefieldError("the cache is empty: run the model on a text with use_cache=True")
    return found


def _flat(layers: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by their names in a file: "3.conv.0", "3.state.0", "4.keys", "4.values"."""
    return {f"{index}.{n}": tensor for index, held in layers.items() for n, tensor in held.items()}


def _held(entry: Any, index: int) -> dict[str, Tensor]:
    """The tensors of one layer's entry; none if it has read nothing or never keeps anything."""
    return {**_recurrent(entry, index), **_attended(entry, index)}


def _recurrent(entry: Any, index: int) -> dict[str, Tensor]:
    """The states of a Mamba layer's entry; a layer may have several of each."""
    if not isinstance(entry, LinearAttentionCacheLayerMixin):
        return {}
    if entry.record_past:
        raise WidefieldError(
            f"layer {index} of the cache records its past for assisted decoding: run the model "
            "without an assistant"
        )
    found = {
        f"{kind}.{number}": states[number]
        for kind, states in (("conv", entry.conv_states), ("state", entry.recurrent_states))
        for number, filled in entry.has_previous_state.items()
        if filled
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _attended(entry: Any, index: int) -> dict[str, Tensor]:
    """What an attention layer's entry has read."""
    keys = getattr(entry, "keys", None)
    if keys is None or not keys.numel():
        return {}
    if type(entry) not in _GROWING:
        raise WidefieldError(
            f"layer {index} of the cache is a {type(entry).__name__}, which cannot be kept: "
            "expected a DynamicCache without a sliding window"
        )
    held = {"keys": keys, "values": entry.values}
    valid = getattr(entry, _VALID, None)
    return held if valid is None else {**held, "valid": valid}


def _repeated(entry: Any, times: int) -> Any:
    """A copy of one layer's entry with each row repeated."""
    twin = copy.copy(entry)
    for name, value in vars(entry).items():
        if isinstance(value, Tensor):
            setattr(twin, name, _rows(value, times))
        elif isinstance(value, dict):
            setattr(twin, name, {key: _rows(part, times) for key, part in value.items()})
    seen = getattr(entry, _SEEN, None)
    if seen is not None and len(seen) > 1:
        setattr(twin, _SEEN, tuple(n for n in seen for _ in range(times)))
    return twin


def _rows(value: Any, times: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().repeat_interleave(times, dim=0)


def _seen(cache: Cache, index: int) -> list[int] | None:
    seen = getattr(cache.layers[index], _SEEN, None)
    return None if seen is None else list(seen)


@torch.no_grad()
def _template(model: nn.Module) -> Cache:
    """The cache behind one token: which tensors this model keeps, and of which shapes."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)  # type: ignore[arg-type]
    output = model(token, use_cache=True)
    return output.get("cache_params") or output.get("past_key_values")


def _fits(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> bool:
    """Whether a file holds what the model keeps, for one number of rows throughout.

    Kernels trust the shapes of a cache, so that none may come from a file unseen.
    """
    marks = {name for name in tensors if name.endswith(".valid")}
    if tensors.keys() - marks != expected.keys():
        return False
    if not all(_is_mark(name, tensors) for name in marks):
        return False
    rows = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors.values()}
    whole = {n: t for n, t in tensors.items() if _mark_of(n) not in marks}
    lengths = {tensor.shape[2] for n, tensor in whole.items() if _grows(n) and tensor.ndim == 4}
    same = all(_shape(n, tensors[n]) == _shape(n, expected[n]) for n in expected)
    layers = {name.partition(".")[0] for name in expected}
    counts = header["seen"].keys() == layers and all(
        _is_count(seen, rows) for seen in header["seen"].values()
    )
    return same and counts and len(rows) == 1 and len(lengths) <= 1


def _mark_of(name: str) -> str:
    return f"{name.partition('.')[0]}.valid"


def _is_mark(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether this can say which of an attention layer's tokens are no padding."""
    index, mark = name.partition(".")[0], tensors[name]
    held = [tensors.get(f"{index}.{kind}") for kind in ("keys", "values")]
    shapes = {None if t is None or t.ndim != 4 else (t.shape[0], t.shape[2]) for t in held}
    return mark.dtype == torch.bool and shapes == {tuple(mark.shape)}


def _grows(name: str) -> bool:
    return name.endswith(("keys", "values"))


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape without what may differ: rows, and the length of what attention has read."""
    shape = tuple(tensor.shape)
    return (len(shape), *shape[1:2], *shape[3:]) if _grows(name) else shape[1:]


def _is_count(seen: object, rows: set[int]) -> bool:
    """Whether this can be how many tokens each row, or all of them, have read."""
    if seen is None:
        return True
    if not isinstance(seen, list) or len(seen) not in {1, *rows}:
        return False
    return all(type(n) is int and n >= 0 for n in seen)


def _put(
    cache: DynamicCache, name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    index, kind, *number = name.split(".")
    layer = int(index)
    if kind == "valid":
        setattr(cache.layers[layer], _VALID, tensors[name])
        return
    dtype = expected[name].dtype
    tensor = tensors[name].to(dtype)
    if kind == "conv":
        cache.update_conv_state(tensor, layer, int(number[0]))
    elif kind == "state":
        cache.update_recurrent_state(tensor, layer, int(number[0]))
    elif kind == "keys":
        cache.update(tensor, tensors[f"{index}.values"].to(dtype), layer)


def _dtype(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


def _write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise WidefieldError(
            f"cannot write the state to {path}: {error}; choose a path in a folder that exists and "
            "can be written"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise WidefieldError(f"no state at {path}: give a file that wf.save_state wrote")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WidefieldError(
            f"{path} is damaged or no safetensors file ({reason}): {_AGAIN}, or copy it again"
        ) from None
    if text is None:
        raise WidefieldError(f"{path} is a safetensors file, but not a state: {_AGAIN}")
    return _checked_header(path, text), tensors


def _checked_header(path: Path, text: str) -> dict[str, Any]:
    header: dict[str, Any] = {}
    try:
        header = json.loads(text)
        version, whole = header["format"], isinstance(header["seen"], dict)
        whole &= {"model_class", "fingerprint", "dtype"} <= header.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, version = False, _FORMAT
    if version != _FORMAT:
        raise WidefieldError(
            f"{path} has state format {version!r}, this version of widefield reads {_FORMAT}: "
            f"update widefield, or {_AGAIN}"
        )
    if not whole:
        raise WidefieldError(f"{path} is not a whole state (its header): {_AGAIN}")
    return header


def _check_model(path: Path, header: Mapping[str, Any], model: nn.Module) -> None:
    theirs = f"{header['model_class']} {header['fingerprint']}"
    ours = f"{type(model).__name__} {weights_fingerprint(model)}"
    # Another dtype may change the fingerprint, too, and is the better explanation.
    if header["dtype"] != _dtype(model):
        raise WidefieldError(
            f"{path} was saved by a model in {header['dtype']}, this one is in {_dtype(model)}: "
            f"load the model with dtype=torch.{header['dtype']}, or let it read the text again"
        )
    if theirs != ours:
        raise WidefieldError(
            f"{path} belongs to {theirs}, the model is {ours}: load the model that saved it, or "
            "let this one read the text again"
        )
