"""What differs between the mixers of transformers, and which of them are supported."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from widefield.errors import WidefieldError
from widefield.families._context import (
    ChunkedPrefill,
    LayerCache,
    Link,
    Observer,
    Padding,
    check_covers,
    read_padding,
)
from widefield.plan import ModelLayout

__all__ = [
    "SUPPORTED",
    "ChunkedPrefill",
    "LayerCache",
    "Link",
    "Observer",
    "Padding",
    "check_covers",
    "describe",
    "fingerprint",
    "mixers",
    "original_class",
    "read_padding",
    "swaps",
    "weights_fingerprint",
]

# mixer class → (module of transformers that defines it, module here that replaces it)
_FAMILIES = {
    "MambaMixer": ("transformers.models.mamba.modeling_mamba", "widefield.families.mamba"),
    "FalconMambaMixer": (
        "transformers.models.falcon_mamba.modeling_falcon_mamba",
        "widefield.families.falcon_mamba",
    ),
    "JambaMambaMixer": ("transformers.models.jamba.modeling_jamba", "widefield.families.jamba"),
    "ZambaMambaMixer": ("transformers.models.zamba.modeling_zamba", "widefield.families.zamba"),
}
SUPPORTED = (
    "Mamba (MambaForCausalLM)",
    "FalconMamba (FalconMambaForCausalLM)",
    "Jamba (JambaForCausalLM)",
    "Zamba (ZambaForCausalLM)",
)
# Mamba-family mixers of transformers that are known and not supported yet: never half-extend such a
# model.
_KNOWN_ELSEWHERE = (
    "Mamba2Mixer",
    "Zamba2MambaMixer",
    "BambaMixer",
    "GraniteMoeHybridMambaLayer",
    "NemotronHMamba2Mixer",
    "FalconH1Mixer",
)


def swaps() -> dict[type[nn.Module], type[nn.Module]]:
    """Class of transformers → class of ours, for every family whose module is already imported."""
    found: dict[type[nn.Module], type[nn.Module]] = {}
    for theirs, ours in _FAMILIES.values():
        if theirs in sys.modules:
            found.update(importlib.import_module(ours).SWAPS)
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """The transformers class of a module, whether or not it has been swapped."""
    back = {ours: theirs for theirs, ours in swaps().items()}
    return back.get(type(module), type(module))


def mixers(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The supported mixers of a model with their layer index, in order; swapped or not.

    Raises:
        WidefieldError: if there is none, or one of a kind that is not supported.
    """
    found: list[tuple[int, nn.Module]] = []
    back = {ours: theirs for theirs, ours in swaps().items()}
    for module in model.modules():
        kind = back.get(type(module), type(module))
        if kind.__name__ in _KNOWN_ELSEWHERE:
            raise WidefieldError(
                f"{_name(model)} holds {kind.__name__} layers, which are not supported: "
                f"supported are {', '.join(SUPPORTED)}"
            )
        family = _FAMILIES.get(kind.__name__)
        if family is not None and kind.__module__ == family[0]:
            found.append((int(module.layer_idx), module))  # type: ignore[arg-type]
    if not found:
        raise WidefieldError(
            f"{_name(model)} holds no Mamba layer that is supported: supported are "
            f"{', '.join(SUPPORTED)}"
        )
    yield from sorted(found, key=lambda pair: pair[0])


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _hash_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{tuple(tensor.shape)}".encode())
    if tensor.is_meta:
        return
    flat = tensor.detach().reshape(-1)
    # bfloat16 so that a checkpoint loaded in another precision is still the same model; at most
    # 4,096 values.
    stride = max(1, flat.numel() // 4096)
    values = flat[::stride].to(torch.bfloat16).cpu().contiguous()
    digest.update(values.view(torch.int16).numpy().tobytes())


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with the weights Δ depends on, and not with dtype or device."""
    digest = hashlib.sha256()
    for layer, mixer in mixers(model):
        digest.update(f"{original_class(mixer).__name__} {layer}".encode())
        for name, parameter in sorted(mixer.named_parameters()):
            _hash_tensor(digest, name, parameter)
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any weight of any model; what is in a cache depends on all."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        _hash_tensor(digest, name, parameter)
    return digest.hexdigest()[:16]


def _decimation(model: nn.Module) -> str | None:
    """Why some family in the model cannot do with fewer tokens, or None."""
    kinds = {original_class(mixer).__name__ for _, mixer in mixers(model)}
    for kind in sorted(kinds):
        family = importlib.import_module(_FAMILIES[kind][1])
        reason = getattr(family, "decimation", None)
        if reason is not None and (said := reason(model)) is not None:
            return said
    return None


def describe(model: nn.Module) -> ModelLayout:
    """What a method may know of the model."""
    pairs = list(mixers(model))
    return ModelLayout(
        model_class=_name(model),
        fingerprint=fingerprint(model),
        layers=tuple(layer for layer, _ in pairs),
        channels=tuple(int(mixer.intermediate_size) for _, mixer in pairs),  # type: ignore[arg-type]
        decimation=_decimation(model),
    )
