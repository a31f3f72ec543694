"""Small random models that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    ZambaConfig,
    ZambaForCausalLM,
)


def tiny_mamba(seed: int = 0) -> MambaForCausalLM:
    """A random byte-level Mamba: width 32, 2 layers, 64 channels of 8 states."""
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MambaForCausalLM(config).eval()


def tiny_family(family: str, **options: object) -> PreTrainedModel:
    """A random model of a Mamba-1 style family with lively weights; options go to its config."""
    config, kind, own = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**{**_SHARED, **own, **options})).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
        if family == "zamba" and ("conv1d" in name or "x_proj" in name):
            parameter.data.mul_(20.0)  # Zamba starts with states too small to show in its logits
        if family == "jamba" and name.endswith("dt_proj.bias"):
            parameter.data.fill_(-4.0)  # Jamba starts with a Δ larger than any trained one
    return model


_SHARED = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_ATTENTION = {
    "num_hidden_layers": 5, "intermediate_size": 48, "mamba_d_state": 8, "mamba_dt_rank": 4,
    "num_attention_heads": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip
_JAMBA = {
    **_ATTENTION, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip
_ZAMBA = {
    **_ATTENTION, "num_key_value_heads": 4, "attention_hidden_size": 64, "n_mamba_heads": 2,
}  # fmt: skip
FAMILIES = {
    "mamba": (MambaConfig, MambaForCausalLM, {"state_size": 8}),
    "falcon": (FalconMambaConfig, FalconMambaForCausalLM, {"state_size": 8}),
    "jamba": (JambaConfig, JambaForCausalLM, _JAMBA),
    "zamba": (ZambaConfig, ZambaForCausalLM, _ZAMBA),
}


def cache_name(model: PreTrainedModel) -> str:
    """What the model calls its cache, as an argument and in its outputs."""
    return "past_key_values" if model.config.model_type in ("jamba", "zamba") else "cache_params"


def states(cache: Any) -> list[Any]:
    """The entries of a cache that belong to Mamba layers."""
    return [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
