"""Mamba-1 style mixers: how they read the scan's inputs, scan, and decode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import ops
from widefield.families._context import LayerCache, derived
from widefield.families._mixer import Mixer, linear, run_with, weights_of
from widefield.families._norms import Norm
from widefield.plan import LayerPlan, ScanInputs


class Mamba1Mixer(Mixer):
    """A mixer of Mamba-1's kind.

    Subclasses say how the input is projected and how Δ, B and C are read from the convolved x;
    nothing else differs.
    """

    time_step_rank: int
    ssm_state_size: int
    in_proj: nn.Linear
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The input x of the convolution and the gate z, (B, L, D) each, of (B, L, H)."""
        x, z = linear(self.in_proj, hidden_states).chunk(2, dim=-1)
        return x, z

    def selective_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw Δ (B, L, D) without bias, B (B, L, N) and C (B, L, N) of the convolved x."""
        low_rank, B, C = linear(self.x_proj, x).split_with_sizes(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        low_rank, B, C = self.norm_inputs(low_rank, B, C)
        return self.project_delta(low_rank), B, C

    def norm_inputs(self, low_rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What happens to Δ's low rank, B and C before their use: nothing."""
        return low_rank, B, C

    def project_delta(self, low_rank: Tensor) -> Tensor:
        """dt_proj without its bias, which the scan adds; through the module if replaced."""
        projection = self.dt_proj
        if type(projection) is nn.Linear:
            return F.linear(low_rank, weights_of(projection)[0])
        delta = projection(low_rank)
        return delta if projection.bias is None else delta - projection.bias

    @property
    def delta_bias(self) -> Tensor | None:
        """(D,) what the scan adds to Δ, in float32."""
        bias = self.dt_proj.bias
        return None if bias is None else bias.float()

    @property
    def raw_delta_bias(self) -> Tensor | None:
        """(D,) the same in the dtype that it has."""
        return weights_of(self.dt_proj)[1]

    @property
    def rates(self) -> Tensor:
        """A (D, N), negative, in float32."""
        return derived(self, "rates", self.A_log, _rates)

    def read(
        self, hidden_states: Tensor, conv_state: Tensor | None, valid: Tensor | None
    ) -> tuple[ScanInputs, None, Tensor]:
        """The scan's inputs, gate included, and the convolution's new state."""
        if valid is not None:
            hidden_states = hidden_states * valid[..., None]
        x, z = self.project(hidden_states)
        x, conv_state = self.convolve(x, conv_state)
        if valid is not None:
            x = x * valid[..., None]
        delta, B, C = self.selective_inputs(x)
        inputs = ScanInputs(
            x=x,
            delta=delta,
            A=self.rates,
            B=B,
            C=C,
            D=self.D if self.D.ndim == 1 else self.D.flatten(),
            z=z,
            delta_bias=self.raw_delta_bias,
            valid=valid,
        )
        return inputs, None, conv_state

    def scan(self, inputs: ScanInputs, gate: None, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
        """The gated output (B, L, D), and the state (B, D, N) behind the last token."""
        return ops.selective_scan(inputs, plan)

    def state_of(self, past: LayerCache | None) -> Tensor | None:
        """The recurrent state (B, D, N), a view of what the cache holds."""
        if past is None or past.state is None:
            return None
        state = past.state
        return state if state.ndim == 3 else state.view(past.batch, -1, self.ssm_state_size)

    def cached(self, state: Tensor) -> Tensor:
        """The state with the heads that it has in the cache, if any."""
        shape = self.A_log.shape
        return state if state.shape[1:] == shape else state.view(-1, *shape)

    def step(self, hidden_states: Tensor, past: LayerCache) -> Tensor:
        """The output (B, 1, H) for one more token a row."""
        x, z = self.project(hidden_states)
        x = self.convolve_one(x, past)
        state = self.state_of(past)
        assert state is not None
        if ops.runs_kernels(x) and type(getattr(self, "dt_proj", None)) is nn.Linear:
            y = self._updated(state, x[:, 0], z[:, 0], self.x_proj(x)[:, 0])
        else:
            delta, B, C = (part[:, 0] for part in self.selective_inputs(x))
            y = ops.selective_state_update(
                *(state, x[:, 0], delta, self.rates, B, C, self.D.float().flatten(), z[:, 0]),
                self.delta_bias,
            )
        past.count(1)
        return self.out_proj(y[:, None].to(hidden_states.dtype))

    def _updated(self, state: Tensor, x: Tensor, z: Tensor, projected: Tensor) -> Tensor:
        """The gated output (B, D) for one more token, of what `x_proj` makes of x (B, D)."""
        rank, size = self.time_step_rank, self.ssm_state_size
        low_rank, B, C = projected.split([rank, size, size], dim=-1)
        low_rank, B, C = self.norm_inputs(low_rank, B, C)
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        return ops.low_rank_state_update(
            state, x, low_rank, weight, self.A_log, B, C, self.D, z, bias
        )

    @property
    def used_in_a_step(self) -> tuple[nn.Module, ...]:
        """The modules whose weights `block_step` reads."""
        return self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj

    def block_step(
        self, hidden_states: Tensor, norm: Norm, past: LayerCache, dtype: torch.dtype
    ) -> Tensor:
        """A block's output (B, 1, H) in `dtype` for one more token a row, in four kernels."""
        x, z = self.projected(hidden_states, norm, past).chunk(2, dim=-1)
        state = self.state_of(past)
        assert state is not None
        y = self._updated(state, x, z, ops.project(x, self.x_proj.weight))
        past.count(1)
        return self.added(y, hidden_states, dtype)

    forward = run_with("conv1d", "dt_proj")


def _rates(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float()).flatten(0, -2)


class NormedMamba1Mixer(Mamba1Mixer):
    """The same for mixers that norm Δ's low rank, B and C."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def norm_inputs(self, low_rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each through its own norm."""
        return self.dt_layernorm(low_rank), self.b_layernorm(B), self.c_layernorm(C)
