"""transformers' Zamba: Mamba-1 in heads, each with its own Δ, B and C; shared attention between."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer, ZambaRMSNorm

from widefield.families._mixer import run_with
from widefield.families._norms import Norm
from widefield.families.mamba1 import Mamba1Mixer


class WidefieldZambaMambaMixer(Mamba1Mixer, ZambaMambaMixer):
    """`ZambaMambaMixer` on our kernels: a head is a group of channels with its own B and C."""

    n_mamba_heads: int
    mamba_head_dim: int
    x_proj_weight: nn.Parameter
    dt_proj_weight: nn.Parameter
    dt_proj_bias: nn.Parameter

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Channel by channel, x and z lie side by side."""
        x, z = self.in_proj(hidden_states).unflatten(-1, (-1, 2)).unbind(-1)
        return x.contiguous(), z.contiguous()

    def selective_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw Δ (B, L, D), B and C (B, L, heads, N), each head's from its own channels."""
        heads = x.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim))
        read = torch.einsum("blhd,hrd->blhr", heads, self.x_proj_weight)
        low_rank, B, C = torch.split(
            read, [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        delta = torch.einsum("blhr,hdr->blhd", low_rank, self.dt_proj_weight)
        return delta.flatten(2), B, C

    @property
    def delta_bias(self) -> Tensor:
        """(D,) of all heads, in float32."""
        return self.dt_proj_bias.float().flatten()

    @property
    def raw_delta_bias(self) -> Tensor:
        """(D,) of all heads, in the dtype that it has."""
        return self.dt_proj_bias.flatten()

    forward = run_with("conv1d")


class WidefieldZambaRMSNorm(Norm, ZambaRMSNorm):
    """`ZambaRMSNorm` in one pass."""


SWAPS = {ZambaMambaMixer: WidefieldZambaMambaMixer, ZambaRMSNorm: WidefieldZambaRMSNorm}


def why_not_decimate(model: nn.Module) -> str:
    """Why no token may be dropped."""
    return "its shared attention joins the tokens with the embeddings of all of them"
