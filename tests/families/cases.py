"""Small random models of every family: what the family tests and the table of the docs run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from widefield.families import swaps

LINEAR, ATTENTION = "linear_attention", "full_attention"
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
_MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 16}
_GRANITE = {
    **_SSD, **_ATTENTION, "layer_types": [LINEAR, ATTENTION, LINEAR, ATTENTION, LINEAR],
    "num_hidden_layers": 5, "shared_intermediate_size": 32,
}  # fmt: skip
_JAMBA = {
    "num_hidden_layers": 4, "mamba_d_state": 8, "attn_layer_period": 4, "attn_layer_offset": 1,
    "num_experts": 2,
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
    "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One small model.

    Attributes:
        family: what the config's and the model's class names begin with.
        mixer: class of its Mamba layers.
        options: of the config.
        variant: what sets it apart from the family's first case, in the words of the docs' table.
        told: whether it is a row of that table, or part of one; others only differ in weights.
    """

    family: str
    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    told: bool = True

    @property
    def heads(self) -> bool:
        """Whether its mixers are of Mamba-2's kind."""
        return self.family not in ("Mamba", "FalconMamba", "Jamba", "Zamba")

    @property
    def model_class(self) -> str:
        """Its class in transformers."""
        return f"{self.family}ForCausalLM"

    def make(self, **options: Any) -> Any:
        """The model, in eval mode, the same weights each time."""
        torch.manual_seed(0)
        common: dict[str, Any] = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3}
        common |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
        config = getattr(transformers, f"{self.family}Config")
        model = getattr(transformers, self.model_class)(
            config(**{**common, **self.options, **options})
        )
        for name, parameter in model.named_parameters():
            _enliven(name, parameter)
        return model.eval()


def _enliven(name: str, parameter: nn.Parameter) -> None:
    """Weights that let every part of a model be felt in its logits."""
    if name.endswith("dt_bias"):
        parameter.data.normal_(-2, 0.5)
    elif "A_log" not in name and parameter.ndim > 1:
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)


CASES = {
    "mamba": Case("Mamba", "MambaMixer", {"state_size": 8}),
    "falcon-mamba": Case("FalconMamba", "FalconMambaMixer", {"state_size": 8}),
    "jamba": Case("Jamba", "JambaMambaMixer", {**_ATTENTION, **_JAMBA}),
    "zamba": Case("Zamba", "ZambaMambaMixer", {**_ATTENTION, **_ZAMBA}),
    "mamba2": Case("Mamba2", "Mamba2Mixer", {**_MAMBA2, "n_groups": 2}),
    "mamba2-relu-bias-limits": Case(
        "Mamba2",
        "Mamba2Mixer",
        {**_MAMBA2, "n_groups": 1, "hidden_act": "relu", "use_bias": True}
        | {"use_conv_bias": False, "time_step_limit": (0.1, 0.2)},
        told=False,
    ),
    "zamba2": Case(
        "Zamba2",
        "Zamba2MambaMixer",
        {"num_hidden_layers": 4, "layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR]}
        | {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 16}
        | {"num_attention_heads": 4, "intermediate_size": 48, "time_step_min": 0.05},
    ),
    "bamba": Case("Bamba", "BambaMixer", {**_SSD, **_ATTENTION, "attn_layer_indices": [1]}),
    "granite": Case(
        "GraniteMoeHybrid",
        "GraniteMoeHybridMambaLayer",
        {**_GRANITE, "num_local_experts": 4, "residual_multiplier": 0.5},
    ),
    "granite-rotary": Case(
        "GraniteMoeHybrid",
        "GraniteMoeHybridMambaLayer",
        {**_GRANITE, "num_local_experts": 0, "position_embedding_type": "rope"},
        variant="with rotary positions",
    ),
    "nemotron-h": Case(
        "NemotronH",
        "NemotronHMamba2Mixer",
        {"layers_block_type": [LINEAR, ATTENTION, LINEAR, "moe", ATTENTION, "mlp", LINEAR]}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
        | {"head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16}
        | {**_ATTENTION, "moe_shared_expert_intermediate_size": 16, "time_step_min": 0.05},
    ),
    "falcon-h1": Case(
        "FalconH1",
        "FalconH1Mixer",
        {**_SSD, **_ATTENTION, "mamba_d_ssm": 64, "mamba_rms_norm": False}
        | {"ssm_in_multiplier": 0.7, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.6]},
    ),
    "falcon-h1-norm": Case(
        "FalconH1",
        "FalconH1Mixer",
        {**_SSD, **_ATTENTION, "mamba_d_ssm": 48, "mamba_d_head": 6}
        | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
        told=False,
    ),
}  # fmt: skip


def supported(case: Case) -> bool:
    """Whether widefield takes the family."""
    getattr(transformers, case.model_class)
    return any(kind.__name__ == case.mixer for kind in swaps())


SUPPORTED_CASES = [name for name, case in CASES.items() if supported(case)]


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 380, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖."""
    return float((value - truth).norm() / truth.norm())
