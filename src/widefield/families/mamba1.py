"""Mamba-1 style mixers and their blocks: read the scan's inputs, run it, finish the block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from widefield import ops
from widefield.errors import WidefieldError
from widefield.families._context import (
    LayerCache,
    Link,
    Padding,
    Shortened,
    mark_shortened,
    padding_of,
    scattered,
    shortened,
)
from widefield.ops import Rows
from widefield.plan import LayerPlan, ScanInputs

_SILU = ("silu", "swish")


class Mamba1Mixer(nn.Module):
    """Mixed into a transformers mixer class: the same weights, our scan, and the layer's plan.

    Subclasses say how Δ, B and C are read from the convolved input; nothing else differs.
    """

    _widefield: Link
    layer_idx: int
    activation: str
    time_step_rank: int
    ssm_state_size: int
    act: nn.Module
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    def selective_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw Δ (B, L, D) without bias, B (B, L, N) and C (B, L, N) of the convolved x."""
        low_rank, B, C = torch.split(
            self.x_proj(x),
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size],
            dim=-1,
        )
        return self.project_delta(low_rank), B, C

    def project_delta(self, low_rank: Tensor) -> Tensor:
        """dt_proj without its bias, which the scan adds; through the module if replaced."""
        projection = self.dt_proj
        if type(projection) is nn.Linear:
            return F.linear(low_rank, projection.weight)
        delta = projection(low_rank)
        return delta if projection.bias is None else delta - projection.bias

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mixer's output (B, L, H), or (B, k, H) where this layer drops tokens."""
        return self.mix(hidden_states, cache_params, attention_mask, None)[0]

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def mix(
        self,
        hidden_states: Tensor,
        cache_params: Any | None,
        attention_mask: Tensor | None,
        note: Shortened | None,
    ) -> tuple[Tensor, Rows | None]:
        """The mixer's output, and the rows it kept if its plan drops tokens.

        Args:
            hidden_states: (B, L, H) normed block input.
            cache_params: transformers cache, or None.
            attention_mask: 2-D mask, left padding only, or None.
            note: the decimation that earlier layers did in this forward, or None.
        """
        batch, length, _ = hidden_states.shape
        past = None
        if cache_params is not None:
            past = LayerCache(cache_params, self.layer_idx, batch)
        if past is not None and past.filled and length == 1:
            return self._step(hidden_states, past), None
        padding = padding_of(hidden_states, attention_mask, note)
        return self._prefill(hidden_states, past, padding)

    def _prefill(
        self, hidden_states: Tensor, past: LayerCache | None, padding: Padding
    ) -> tuple[Tensor, Rows | None]:
        valid = padding.valid
        if valid is not None:
            hidden_states = hidden_states * valid[..., None]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        silu = self.activation in _SILU
        x, conv_state = ops.causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            silu=silu,
            initial_state=None if past is None else past.conv_state,
        )
        if not silu:
            x = self.act(x)
        if valid is not None:
            x = x * valid[..., None]
        inputs = self._scan_inputs(x, z, None if past is None else past.state, valid)
        link = self._widefield
        if link.observer is not None:
            link.observer(self.layer_idx, inputs)
        seen = (0,) if past is None else past.seen
        plan = link.plan(self.layer_idx, seen, padding.lengths, hidden_states.device)
        rows, lengths = None, padding.lengths
        if plan is not None and plan.pool is not None:
            inputs, rows = self._pool(inputs, plan)
            lengths = Padding.of_valid(rows.valid, rows.index.shape[1]).lengths
        y, state = ops.selective_scan(inputs, plan)
        if plan is not None and plan.touches_scan:
            self._check_finite(state)
        if past is not None:
            past.store(conv_state, state, lengths)
        out = self.out_proj(y.to(hidden_states.dtype))
        if rows is None or plan is None or plan.pool is None or not plan.pool.scatter:
            return out, rows
        return scattered(rows, out, hidden_states.shape[1]), None

    def _scan_inputs(
        self, x: Tensor, z: Tensor, state: Tensor | None, valid: Tensor | None
    ) -> ScanInputs:
        delta, B, C = self.selective_inputs(x)
        bias = self.dt_proj.bias
        return ScanInputs(
            x=x,
            delta=delta,
            A=-torch.exp(self.A_log.float()),
            B=B,
            C=C,
            D=self.D.float(),
            z=z,
            delta_bias=None if bias is None else bias.float(),
            initial_state=state,
            valid=valid,
        )

    def _pool(self, inputs: ScanInputs, plan: LayerPlan) -> tuple[ScanInputs, Rows]:
        assert plan.pool is not None
        try:
            return ops.pool_tokens(inputs, plan.pool)
        except WidefieldError as error:
            raise WidefieldError(f"layer {self.layer_idx}: {error}") from None

    def _check_finite(self, state: Tensor) -> None:
        if not bool(torch.isfinite(state).all()):
            raise WidefieldError(
                f"layer {self.layer_idx}: the state is not finite after the scan (non-finite Δ "
                "or input); "
                "check the model's weights and its dtype (float32 is safest)"
            )

    def _step(self, hidden_states: Tensor, past: LayerCache) -> Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        silu = self.activation in _SILU
        x, conv_state = ops.causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            silu=silu,
            initial_state=past.conv_state,
        )
        if not silu:
            x = self.act(x)
        delta, B, C = self.selective_inputs(x)
        assert past.state is not None
        y = ops.selective_state_update(
            past.state,
            x[:, 0],
            delta[:, 0],
            -torch.exp(self.A_log.float()),
            B[:, 0],
            C[:, 0],
            self.D.float(),
            z[:, 0],
            self.dt_proj.bias,
        )
        past.store(conv_state, None, (1,))
        return self.out_proj(y[:, None].to(hidden_states.dtype))


class Mamba1Block(nn.Module):
    """Mixed into a transformers block class: the residual keeps the mixer's rows."""

    norm: nn.Module
    mixer: Mamba1Mixer
    residual_in_fp32: bool

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Norm, mixer, residual: (B, L, H) → (B, L, H), or (B, k, H) if tokens are dropped."""
        note = shortened(hidden_states)
        residual = hidden_states
        normed = self.norm(hidden_states.to(self.norm.weight.dtype))  # type: ignore[arg-type]
        if self.residual_in_fp32:
            residual = residual.to(torch.float32)
        mixed, rows = self.mixer.mix(normed, cache_params, attention_mask, note)
        if rows is not None:
            residual = rows.gather(residual)
            length = hidden_states.shape[1] if note is None else note.length
            note = Shortened(rows, length)
        out = residual + mixed
        return out if note is None else mark_shortened(out, note)
