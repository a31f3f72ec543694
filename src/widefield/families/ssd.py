"""Mamba-2 style mixers: how they read the scan's inputs, scan, and decode."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from widefield import ops
from widefield.families._context import LayerCache, derived, is_bare
from widefield.families._mixer import Mixer, is_plain, linear, run_with
from widefield.families._norms import GatedNorm, Norm
from widefield.plan import LayerPlan, SSDInputs


class SSDMixer(Mixer):
    """A mixer of Mamba-2's kind.

    Subclasses say where a model departs from Mamba-2's projection and its gated norm; all else is
    the same in every family.
    """

    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int
    time_step_limit: tuple[float, float]
    in_proj: nn.Linear
    norm: nn.Module
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

    def project(
        self, hidden_states: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length projected"]:
        """Gate, convolution's input and raw Δ, side by side in this order."""
        return linear(self.in_proj, hidden_states)

    def gated(
        self,
        y: Float[Tensor, "batch length channels"],
        gate: Float[Tensor, "batch length channels"],
    ) -> Float[Tensor, "batch length channels"]:
        """The scan's output behind the gate and the norm."""
        return self.norm(y, gate)

    def read(
        self, hidden_states: Tensor, conv_state: Tensor | None, valid: Tensor | None
    ) -> tuple[SSDInputs, Tensor, Tensor]:
        """The scan's inputs, the gate and the convolution's new state."""
        if valid is not None:
            hidden_states = hidden_states * valid[..., None]
        gate, mixed, delta, conv_state = self._convolved(hidden_states, conv_state)
        if valid is not None:
            mixed = mixed * valid[..., None]
        x, B, C = self._by_head(mixed)
        low, high = self.time_step_limit
        inputs = SSDInputs(
            x=x,
            delta=delta,
            A=derived(self, "rates", self.A_log, _rates),
            B=B,
            C=C,
            D=self.D,
            delta_bias=self.dt_bias,
            delta_limit=(float(low), float(high)),
            valid=valid,
        )
        return inputs, gate, conv_state

    def _convolved(
        self, hidden_states: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gate, convolved x|B|C, raw Δ, and the convolution's new state."""
        gate, mixed, delta = self.project(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        mixed, conv_state = self.convolve(mixed, before)
        return gate, mixed, delta, conv_state

    def _by_head(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolved x|B|C as x (…, H, P), B and C (…, G, N)."""
        states = self.n_groups * self.ssm_state_size
        x, B, C = mixed.split([self.intermediate_size, states, states], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))
        return x, B, C

    def scan(
        self, inputs: SSDInputs, gate: Tensor, plan: LayerPlan | None
    ) -> tuple[Tensor, Tensor]:
        """The gated output (B, L, D), and the state (B, H, P, N) behind the last token."""
        y, state = ops.ssd(inputs, plan)
        return self.gated(y.flatten(2), gate), state

    def scan_unscaled(
        self, inputs: SSDInputs, gate: Tensor, plan: LayerPlan | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The norm's scale, one number a token, may as well be applied behind `out_proj`."""
        norm, z = self.norm, gate.unflatten(-1, (self.num_heads, self.head_dim))
        if isinstance(norm, GatedNorm) and self._scales_rows(norm, gate):
            weight: Tensor = norm.weight
            if ops.gates_in_the_scan(inputs, z, weight):
                y, state, squares = ops.gated_ssd(inputs, z, weight, plan)
                eps: float = norm.variance_epsilon
                return y.flatten(2), state, ops.inverse_rms(squares, weight.shape[0], eps)
        return super().scan_unscaled(inputs, gate, plan)

    def _scales_rows(self, norm: GatedNorm, gate: Tensor) -> bool:
        """Whether the gated norm multiplies whole rows, and nothing but a product comes behind."""
        return (
            norm.groups == 1
            and norm.gate_first
            and type(self).gated is SSDMixer.gated
            and is_bare(norm)
            and is_plain(self.out_proj, gate)
            and self.out_proj.bias is None
        )

    def step(self, hidden_states: Tensor, past: LayerCache) -> Tensor:
        """The output (B, 1, width) for one more token a row."""
        gate, mixed, delta = self.project(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        x, B, C = self._by_head(self.convolve_one(mixed, past)[:, 0])
        assert past.state is not None
        # Without the model's limits of Δ, which transformers ignores in a step, too.
        y = ops.ssd_state_update(
            past.state,
            x,
            delta[:, 0],
            self.A_log,
            B,
            C,
            self.D,
            self.dt_bias,
            delta_limit=(0.0, math.inf),
            log_rates=True,
        )
        past.count(1)
        out = self.gated(y.flatten(1)[:, None], gate)
        return self.out_proj(out.to(hidden_states.dtype))

    @property
    def used_in_a_step(self) -> tuple[nn.Module, ...]:
        """The modules whose weights `block_step` reads."""
        return self.in_proj, self.conv1d, self.norm, self.out_proj

    def block_step(
        self, hidden_states: Tensor, norm: Norm, past: LayerCache, dtype: torch.dtype
    ) -> Tensor:
        """A block's output (B, 1, H) in `dtype` for one more token a row, in three kernels."""
        gated = self.norm
        assert isinstance(gated, GatedNorm)
        assert past.state is not None
        gate, mixed, delta = self.projected(
            hidden_states, norm, past, self.intermediate_size
        ).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        x, B, C = self._by_head(mixed)
        y = ops.ssd_state_update(
            *(past.state, x, delta, self.A_log, B, C, self.D, self.dt_bias), log_rates=True
        ).flatten(1)
        past.count(1)
        if gated.groups == 1 and gated.gate_first:
            return self.added(
                *(y, hidden_states, dtype),
                gate=gate,
                norm=gated.weight,
                eps=gated.variance_epsilon,
            )
        return self.added(gated(y, gate), hidden_states, dtype)

    forward = run_with("conv1d")


def _rates(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float())
