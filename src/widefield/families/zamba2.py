"""transformers' Zamba2: Mamba-2 layers, some with a shared attention block in front."""

from __future__ import annotations

from torch import nn
from transformers.models.zamba2.modeling_zamba2 import (
    Zamba2MambaMixer,
    Zamba2RMSNorm,
    Zamba2RMSNormGated,
)

from widefield.families._norms import GatedNorm, Norm
from widefield.families.ssd import SSDMixer


class WidefieldZamba2MambaMixer(SSDMixer, Zamba2MambaMixer):
    """`Zamba2MambaMixer` on our kernels."""


def why_not_decimate(model: nn.Module) -> str | None:
    """The shared block reads the residual stream and the embeddings side by side."""
    return "its shared attention block joins every layer's input to the embeddings of all tokens"


class WidefieldZamba2RMSNorm(Norm, Zamba2RMSNorm):
    """`Zamba2RMSNorm` in one pass."""


class WidefieldZamba2RMSNormGated(GatedNorm, Zamba2RMSNormGated):
    """`Zamba2RMSNormGated` in one pass."""


SWAPS = {
    Zamba2MambaMixer: WidefieldZamba2MambaMixer,
    Zamba2RMSNorm: WidefieldZamba2RMSNorm,
    Zamba2RMSNormGated: WidefieldZamba2RMSNormGated,
}
