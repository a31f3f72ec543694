"""transformers' FalconMamba: Mamba-1 with weightless RMS norms on Δ, B and C."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.falcon_mamba.modeling_falcon_mamba import (
    FalconMambaBlock,
    FalconMambaMixer,
)

from widefield.families.mamba1 import Mamba1Block, Mamba1Mixer


class WidefieldFalconMambaMixer(Mamba1Mixer, FalconMambaMixer):
    """`FalconMambaMixer` on our kernels."""

    def selective_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw Δ, B and C, each normed before use."""
        low_rank, B, C = torch.split(
            self.x_proj(x),
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size],
            dim=-1,
        )
        delta = self.project_delta(self.dt_layernorm(low_rank))
        return delta, self.b_layernorm(B), self.c_layernorm(C)


class WidefieldFalconMambaBlock(Mamba1Block, FalconMambaBlock):
    """`FalconMambaBlock` whose mixer may drop tokens."""


SWAPS = {
    FalconMambaMixer: WidefieldFalconMambaMixer,
    FalconMambaBlock: WidefieldFalconMambaBlock,
}
