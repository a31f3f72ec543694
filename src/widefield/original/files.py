"""Read the tensors of a checkpoint, and nothing but tensors, whatever its files hold."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from widefield.errors import WidefieldError

__all__ = ["HUB_OPTIONS", "Place", "read_tensors"]

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""Keywords of `from_pretrained` that say where files are, and not what is made of them."""

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIX = ".index.json"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's files are.

    Attributes:
        path: a folder, or a hub id.
        options: those of `HUB_OPTIONS` that were given.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """A file of the checkpoint, from the hub's cache or downloaded if it is not local."""
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(self.path, name, **self.options)
        except OSError:
            return None
        return None if found is None else Path(found)

    def config(self) -> dict[str, Any]:
        """`config.json`; empty if there is none.

        Raises:
            WidefieldError: if it is not a JSON object.
        """
        file = self.find("config.json")
        if file is None:
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise WidefieldError("config.json is no JSON object: copy it again")
        return content


def read_tensors(place: Place) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names, on the CPU; mapped from disk where that works.

    Raises:
        WidefieldError: if there are no weights, a file is missing or damaged, or holds anything
            else than tensors.
    """
    for name in _WHOLE:
        file = place.find(name)
        if file is not None:
            return _read(file)
        index = place.find(_indexed(name))
        if index is not None:
            return _read_shards(place, index)
    names = ", ".join(name for whole in _WHOLE for name in (whole, _indexed(whole)))
    raise WidefieldError(f"no weights: expected one of {names}")


def _indexed(name: str) -> str:
    """`model.safetensors.index.json`, `pytorch_model.bin.index.json`."""
    return f"{name}{_SUFFIX}"


def _read_shards(place: Place, index: Path) -> dict[str, Tensor]:
    try:
        homes = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(homes.values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (ValueError, KeyError, TypeError):
        raise WidefieldError(
            f"{index.name} is no index of weights: expected an object with weight_map, tensor → "
            "file; copy it again"
        ) from None
    if not inside:
        raise WidefieldError(f"{index.name} names files elsewhere: expected files beside it")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        file = place.find(shard)
        if file is None:
            raise WidefieldError(f"{index.name} names {shard}, which is not there: copy it, too")
        tensors.update(_read(file))
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from None
    return _only_tensors(file, _unpickle(file))


def _unpickle(file: Path) -> object:
    """What a file written by `torch.save` holds; anything but plain data is refused unread."""
    try:
        # Only the newer of the two formats can be mapped.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except MemoryError:
        raise
    # A damaged file fails in a dozen ways, each with a class of its own.
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise WidefieldError(
                f"{file.name} holds something else than tensors, or is damaged: it was not loaded "
                "and nothing in it was run; take a file of tensors, best as safetensors"
            ) from None
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> WidefieldError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return WidefieldError(f"{file.name} is damaged or cut short ({reason}): copy it again")


def _only_tensors(file: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise WidefieldError(
            f"{file.name} holds a {type(content).__name__}: expected a dictionary of tensors"
        )
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise WidefieldError(
            f"{file.name} holds more than tensors ({', '.join(others[:3])}): expected the model's "
            "weights alone"
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}
