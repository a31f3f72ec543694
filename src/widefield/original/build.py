"""Put the tensors of an original checkpoint into the transformers model that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widefield.errors import WidefieldError
from widefield.original.config import is_original, translate
from widefield.original.files import Place, read_tensors

__all__ = ["build", "is_original"]

_EMBEDDING = "backbone.embeddings.weight"
_RENAMED = {"backbone.embedding.weight": _EMBEDDING}
_HEAD = "lm_head.weight"
_NAMED = 10


def build(
    place: Place,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The transformers model of an original checkpoint, on the CPU.

    Args:
        place: where its files are.
        config: its `config.json`.
        dtype: of the weights; None = as they are stored.
        **kwargs: passed to `from_pretrained`.

    Returns:
        A `MambaForCausalLM` or `Mamba2ForCausalLM`.

    Raises:
        WidefieldError: if transformers has no such model, a file is damaged or holds more than
            tensors, or tensors are missing, too many, or of another shape.
    """
    from transformers import Mamba2ForCausalLM, MambaForCausalLM

    translated = translate(config)
    kind: Any = Mamba2ForCausalLM if translated.model_type == "mamba2" else MambaForCausalLM
    stored = {_RENAMED.get(name, name): tensor for name, tensor in read_tensors(place).items()}
    if translated.tie_word_embeddings:
        stored = _without_tied_head(stored)
    with torch.device("meta"):
        empty = kind(translated)
    _check(stored, empty, translated.tie_word_embeddings)
    chosen = stored[_EMBEDDING].dtype if dtype is None else dtype
    model = kind.from_pretrained(None, config=translated, state_dict=stored, dtype=chosen, **kwargs)
    model.config._name_or_path = place.path
    return model


def _without_tied_head(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the output layer's, which is the embedding once more."""
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    if head is None or embedding is None:
        return stored
    shared = head.data_ptr() == embedding.data_ptr() and head.shape == embedding.shape
    if not (shared or torch.equal(head, embedding)):
        raise WidefieldError(
            f"{_HEAD} differs from the embedding, and config.json ties the two: if they were "
            'trained apart, say "tie_embeddings": false there'
        )
    return {name: tensor for name, tensor in stored.items() if name != _HEAD}


def _check(stored: Mapping[str, Tensor], empty: nn.Module, tied: bool) -> None:
    """Name everything that does not fit, at once."""
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    if tied:
        del expected[_HEAD]
    faults = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - expected.keys()),
        "not of real numbers": _unreal(stored),
        "of another shape": [
            f"{name} {tuple(stored[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in stored and tuple(stored[name].shape) != shape
        ],
    }
    said = [f"{what}: {_list(names)}" for what, names in faults.items() if names]
    if said:
        raise WidefieldError(f"the weights do not belong to config.json; {'; '.join(said)}")


def _unreal(stored: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in stored.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided
    ]


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
