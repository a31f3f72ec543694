"""What differs between the mixers of transformers, and which of them are supported."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.errors import WidefieldError
from widefield.families._attention import counted_attention
from widefield.families._blocks import chain_blocks
from widefield.families._context import (
    ChunkedPrefill,
    LayerCache,
    Link,
    Observer,
    Padding,
    check_covers,
    check_finite,
    read_padding,
)
from widefield.families._fixed import Behind, FixedAttention, attends, what_attention_needs
from widefield.plan import ModelLayout

__all__ = [
    "SUPPORTED",
    "Behind",
    "ChunkedPrefill",
    "FixedAttention",
    "LayerCache",
    "Link",
    "Observer",
    "Padding",
    "attends",
    "chain_blocks",
    "check_covers",
    "check_finite",
    "counted_attention",
    "describe",
    "fingerprint",
    "mixers",
    "original_class",
    "read_padding",
    "swaps",
    "weights_fingerprint",
    "what_attention_needs",
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
    "Mamba2Mixer": ("transformers.models.mamba2.modeling_mamba2", "widefield.families.mamba2"),
    "Zamba2MambaMixer": ("transformers.models.zamba2.modeling_zamba2", "widefield.families.zamba2"),
    "BambaMixer": ("transformers.models.bamba.modeling_bamba", "widefield.families.bamba"),
    "GraniteMoeHybridMambaLayer": (
        "transformers.models.granitemoehybrid.modeling_granitemoehybrid",
        "widefield.families.granitemoehybrid",
    ),
    "NemotronHMamba2Mixer": (
        "transformers.models.nemotron_h.modeling_nemotron_h",
        "widefield.families.nemotron_h",
    ),
    "FalconH1Mixer": (
        "transformers.models.falcon_h1.modeling_falcon_h1",
        "widefield.families.falcon_h1",
    ),
}
SUPPORTED = (
    "Mamba (MambaForCausalLM)",
    "FalconMamba (FalconMambaForCausalLM)",
    "Jamba (JambaForCausalLM)",
    "Zamba (ZambaForCausalLM)",
    "Mamba2 (Mamba2ForCausalLM)",
    "Zamba2 (Zamba2ForCausalLM)",
    "Bamba (BambaForCausalLM)",
    "GraniteMoeHybrid (GraniteMoeHybridForCausalLM)",
    "NemotronH (NemotronHForCausalLM)",
    "FalconH1 (FalconH1ForCausalLM)",
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
        family = _FAMILIES.get(kind.__name__)
        if family is not None and kind.__module__ == family[0]:
            found.append((int(module.layer_idx), module))  # type: ignore[arg-type]
        elif _is_recurrent(module):
            raise WidefieldError(
                f"{_name(model)} holds {kind.__name__} layers, which are not supported: "
                f"supported are {', '.join(SUPPORTED)}"
            )
    if not found:
        raise WidefieldError(
            f"{_name(model)} holds no Mamba layer that is supported: supported are "
            f"{', '.join(SUPPORTED)}"
        )
    yield from sorted(found, key=lambda pair: pair[0])


def _is_recurrent(module: nn.Module) -> bool:
    """Whether a module looks like a state-space layer, of whatever kind: it has decay rates.

    A model that mixes such layers with supported ones must never be half-extended.
    """
    return isinstance(getattr(module, "A_log", None), nn.Parameter)


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


def describe(model: nn.Module) -> ModelLayout:
    """What a method may know of the model."""
    pairs = list(mixers(model))
    return ModelLayout(
        model_class=_name(model),
        fingerprint=fingerprint(model),
        layers=tuple(layer for layer, _ in pairs),
        channels=tuple(_channels(mixer) for _, mixer in pairs),
        decimation=_why_not_decimate(model, [mixer for _, mixer in pairs]),
    )


def _channels(mixer: Any) -> int:
    """Heads of Mamba-2, which has one decay rate a head; else D."""
    return int(mixer.num_heads if mixer.A_log.ndim == 1 else mixer.intermediate_size)


def _why_not_decimate(model: nn.Module, mixers: Sequence[nn.Module]) -> str | None:
    """The first reason that a family of the model's mixers gives, if any does."""
    for kind in {original_class(mixer) for mixer in mixers}:
        family = importlib.import_module(_FAMILIES[kind.__name__][1])
        ask = getattr(family, "why_not_decimate", None)
        reason = None if ask is None else ask(model)
        if reason is not None:
            return reason
    return None
