"""Small random models that the tests share."""

from __future__ import annotations

import torch
from transformers import MambaConfig, MambaForCausalLM


def tiny_mamba(seed: int = 0) -> MambaForCausalLM:
    """A random byte-level Mamba: width 32, 2 layers, 64 channels of 8 states."""
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MambaForCausalLM(config).eval()
