"""Mamba-2 style mixers: read the scan's inputs, run it, finish the mixer's output."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from widefield import ops
from widefield.errors import WidefieldError
from widefield.families._context import (
    LayerCache,
    Link,
    Padding,
    Trail,
    check_whole,
    padding_of,
    plan_of,
    scattered,
)
from widefield.ops import Rows
from widefield.plan import LayerPlan, Pool, SSDInputs

_SILU = ("silu", "swish")


class SSDMixer(nn.Module):
    """Mixed into a transformers mixer class: the same weights, our scan, and the layer's plan.

    Subclasses say where a model departs from Mamba-2's projection and its gated norm; all else is
    the same in every family.
    """

    reads_chunks: ClassVar[bool] = True

    _widefield: Link
    layer_idx: int
    activation: str
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int
    time_step_limit: tuple[float, float]
    act: nn.Module
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    norm: nn.Module
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

    def project(
        self, hidden_states: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length projected"]:
        """Gate, convolution's input and raw Δ, side by side in this order."""
        return self.in_proj(hidden_states)

    def gated(
        self,
        y: Float[Tensor, "batch length channels"],
        gate: Float[Tensor, "batch length channels"],
    ) -> Float[Tensor, "batch length channels"]:
        """The scan's output behind the gate and the norm."""
        return self.norm(y, gate)

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        *,
        widefield_trail: Trail | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mixer's output, 0 at dropped tokens.

        Args:
            hidden_states: (B, L, width) normed block input.
            cache_params: transformers cache, or None.
            attention_mask: 2-D mask, left padding only, or None.
            widefield_trail: what the block knows of dropped tokens and wants to know; None for a
                block whose residual stream is never shortened.
            **kwargs: of transformers, not needed here.
        """
        batch, length, _ = hidden_states.shape
        past = None
        if cache_params is not None:
            past = LayerCache(cache_params, self.layer_idx, batch)
        trail = Trail() if widefield_trail is None else widefield_trail
        if past is not None and past.decodes(length, trail.note):
            return self._step(hidden_states, past)
        padding = padding_of(hidden_states, attention_mask, trail.note, past)
        return self._prefill(hidden_states, past, padding, trail)

    def _prefill(
        self, hidden_states: Tensor, past: LayerCache | None, padding: Padding, trail: Trail
    ) -> Tensor:
        inputs, gate, conv_state = self._scan_inputs(hidden_states, past, padding.valid)
        link = self._widefield
        if link.observer is not None:
            link.observer(self.layer_idx, inputs)
        device = hidden_states.device
        plan = plan_of(link, self.layer_idx, past, padding, trail.note, device)
        pool = None if plan is None else plan.pool
        if plan is None or pool is None:
            out, state = self._scan(inputs, gate, plan, hidden_states.dtype)
            lengths = padding.lengths
        else:
            check_whole(past, self.layer_idx)
            kept, rows = self._pool(inputs, pool)
            out, state = self._scan(kept, rows.gather(gate), plan, hidden_states.dtype)
            out = scattered(rows, out, hidden_states.shape[1])
            lengths = Padding.of_valid(rows.valid, rows.index.shape[1]).lengths
            trail.rows = None if pool.scatter else rows
        if past is not None:
            past.store(conv_state, state, lengths)
        return out

    def _scan_inputs(
        self,
        hidden_states: Tensor,
        past: LayerCache | None,
        valid: Bool[Tensor, "batch length"] | None,
    ) -> tuple[SSDInputs, Tensor, Tensor]:
        """The scan's inputs, the gate and the convolution's new state."""
        if valid is not None:
            hidden_states = hidden_states * valid[..., None]
        gate, mixed, delta, conv_state = self._convolved(
            hidden_states, None if past is None else past.conv_state
        )
        if valid is not None:
            mixed = mixed * valid[..., None]
        x, B, C = self._by_head(mixed)
        low, high = self.time_step_limit
        inputs = SSDInputs(
            x=x,
            delta=delta,
            A=-torch.exp(self.A_log.float()),
            B=B,
            C=C,
            D=self.D.float(),
            delta_bias=self.dt_bias.float(),
            delta_limit=(float(low), float(high)),
            initial_state=None if past is None else past.state,
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
        silu = self.activation in _SILU
        mixed, conv_state = ops.causal_conv1d(
            mixed,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            silu=silu,
            initial_state=before,
        )
        return gate, mixed if silu else self.act(mixed), delta, conv_state

    def _by_head(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolved x|B|C as x (…, H, P), B and C (…, G, N)."""
        states = self.n_groups * self.ssm_state_size
        x, B, C = mixed.split([self.intermediate_size, states, states], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))
        return x, B, C

    def _scan(
        self, inputs: SSDInputs, gate: Tensor, plan: LayerPlan | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The mixer's output in `dtype`, and the state behind the last token."""
        y, state = ops.ssd(inputs, plan)
        if plan is not None and plan.touches_scan and not bool(torch.isfinite(state).all()):
            raise WidefieldError(
                f"layer {self.layer_idx}: the state is not finite after the scan (non-finite Δ "
                "or input); check the model's weights and its dtype (float32 is safest)"
            )
        return self.out_proj(self.gated(y.flatten(2), gate).to(dtype)), state

    def _pool(self, inputs: SSDInputs, pool: Pool) -> tuple[SSDInputs, Rows]:
        try:
            return ops.pool_tokens(inputs, pool)
        except WidefieldError as error:
            raise WidefieldError(f"layer {self.layer_idx}: {error}") from None

    def _step(self, hidden_states: Tensor, past: LayerCache) -> Tensor:
        gate, mixed, delta, conv_state = self._convolved(hidden_states, past.conv_state)
        x, B, C = self._by_head(mixed[:, 0])
        assert past.state is not None
        # Without the model's limits of Δ, which transformers ignores in a step, too.
        y = ops.ssd_state_update(
            past.state,
            x,
            delta[:, 0],
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            self.dt_bias,
            delta_limit=(0.0, math.inf),
        )
        past.store(conv_state, None, (1,))
        out = self.gated(y.flatten(1)[:, None], gate)
        return self.out_proj(out.to(hidden_states.dtype))
