"""Mamba-1 style mixers and their blocks: read the scan's inputs, run it, finish the block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
    carry,
    check_whole,
    padding_of,
    plan_of,
    scattered,
    shortened,
)
from widefield.ops import Survivors
from widefield.plan import LayerPlan, Pool, ScanInputs

_SILU = ("silu", "swish")
# Tokens of all rows that a mixer holds in between at a time, where nobody needs them whole.
TILE = {"cpu": 4096, "cuda": 1 << 17}


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a mixer hands back to its block.

    Attributes:
        output: (B, k, H) of the mixer, k = L where nothing was dropped.
        residual: (B, k, H) the same rows of the residual stream.
        note: the decimation that is behind these rows, or None.
        valid: (B, k) False where a row is padding, or None if none is.
    """

    output: Tensor
    residual: Tensor
    note: Shortened | None
    valid: Tensor | None


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of the sequence.

    Attributes:
        part: which tokens.
        inputs: what the scan reads there, without a state.
        conv_state: (B, D, K) of the convolution behind it.
    """

    part: slice
    inputs: ScanInputs
    conv_state: Tensor


class Mamba1Mixer(nn.Module):
    """Mixed into a transformers mixer class: the same weights, our scan, and the layer's plan.

    Subclasses say how the input is projected and how Δ, B and C are read from the convolved x;
    nothing else differs.
    """

    reads_chunks: ClassVar[bool] = True

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

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The input x of the convolution and the gate z, (B, L, D) each, of (B, L, H)."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        return x, z

    def selective_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw Δ (B, L, D) without bias, B (B, L, N) and C (B, L, N) of the convolved x."""
        low_rank, B, C = torch.split(
            self.x_proj(x),
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size],
            dim=-1,
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
            return F.linear(low_rank, projection.weight)
        delta = projection(low_rank)
        return delta if projection.bias is None else delta - projection.bias

    @property
    def delta_bias(self) -> Tensor | None:
        """(D,) what the scan adds to Δ, in float32."""
        bias = self.dt_proj.bias
        return None if bias is None else bias.float()

    @property
    def rates(self) -> Tensor:
        """A (D, N), negative, in float32."""
        return -torch.exp(self.A_log.float()).flatten(0, -2)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mixer's output (B, L, H), or (B, k, H) where this layer drops tokens."""
        return self.mix(hidden_states, hidden_states, cache_params, attention_mask, None).output

    def run(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        cache_params: Any | None,
        attention_mask: Tensor | None,
        note: Shortened | None,
    ) -> Mixed:
        """The mixer's output, and the rows of the residual stream that go with it.

        Args:
            hidden_states: (B, L, H) normed block input.
            residual: (B, L, H) what the block adds the output to.
            cache_params: transformers cache, or None.
            attention_mask: 2-D mask, left padding only, or None.
            note: the decimation that earlier layers did in this forward, or None.
        """
        batch, length, _ = hidden_states.shape
        past = None
        if cache_params is not None:
            past = LayerCache(cache_params, self.layer_idx, batch)
        if past is not None and past.decodes(length, note):
            return Mixed(self._step(hidden_states, past), residual, None, None)
        padding = padding_of(hidden_states, attention_mask, note, past)
        device = hidden_states.device
        plan = plan_of(self._widefield, self.layer_idx, past, padding, note, device)
        if plan is not None and plan.pool is not None:
            return self._shorten(hidden_states, residual, past, padding, plan, note)
        output = self._prefill(hidden_states, past, padding, plan)
        return Mixed(output, residual, note, padding.valid)

    mix = force_accelerate_hooks(["conv1d", "dt_proj"])(run)

    def _prefill(
        self,
        hidden_states: Tensor,
        past: LayerCache | None,
        padding: Padding,
        plan: LayerPlan | None,
    ) -> Tensor:
        """One tile after the other, so that only the output is as long as the input."""
        state, output, tile = self._state(past), None, None
        for tile in self._read(hidden_states, past, padding):
            y, state = ops.selective_scan(tile.inputs.replace(initial_state=state), plan)
            done = self.out_proj(y.to(hidden_states.dtype))
            if done.shape[1] == hidden_states.shape[1]:
                output = done
            else:
                output = _room(output, done, hidden_states.shape[1])
                output[:, tile.part] = done
        assert output is not None and tile is not None and state is not None
        self._close(past, plan, tile.conv_state, state, padding.lengths)
        return output

    def _shorten(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        past: LayerCache | None,
        padding: Padding,
        plan: LayerPlan,
        note: Shortened | None,
    ) -> Mixed:
        """Keep the best tokens; of a prefill in chunks, nothing goes on before the last chunk."""
        assert plan.pool is not None
        if plan.pool.scatter:
            check_whole(past, self.layer_idx)
        state, tile = self._state(past), None
        survivors = Survivors(plan.pool) if past is None else past.survivors(plan.pool)
        for tile in self._read(hidden_states, past, padding):
            self._offer(survivors, tile.inputs, plan.pool, residual[:, tile.part])
        assert tile is not None
        if past is not None and past.more_to_come(note):
            survivors.thin()
            past.store_conv(tile.conv_state)
            return Mixed(hidden_states[:, :0], residual[:, :0], note, None)
        rows, tokens = survivors.take()
        whole, residual = residual, tokens.pop("residual")
        kept = tile.inputs.replace(**tokens, valid=rows.valid, initial_state=state)
        y, state = ops.selective_scan(kept, plan)
        lengths = Padding.of_valid(rows.valid, rows.index.shape[1]).lengths
        self._close(past, plan, tile.conv_state, state, lengths)
        output = self.out_proj(y.to(hidden_states.dtype))
        length = hidden_states.shape[1]
        if plan.pool.scatter:
            return Mixed(scattered(rows, output, length), whole, note, padding.valid)
        length = length if note is None else note.length
        return Mixed(output, residual, Shortened(rows, length), rows.valid)

    def _read(
        self, hidden_states: Tensor, past: LayerCache | None, padding: Padding
    ) -> Iterator[Tile]:
        """The scan's inputs tile by tile."""
        conv_state = None if past is None else past.conv_state
        for part in self._tiles(hidden_states):
            valid = None if padding.valid is None else padding.valid[:, part]
            inputs, conv_state = self._scan_inputs(hidden_states[:, part], conv_state, valid)
            if self._widefield.observer is not None:
                whole = inputs.replace(initial_state=self._state(past))
                self._widefield.observer(self.layer_idx, whole)
            yield Tile(part, inputs, conv_state)

    def _tiles(self, hidden_states: Tensor) -> Iterator[slice]:
        """Pieces of the sequence; one piece where gradients or an observer need it whole."""
        batch, length, _ = hidden_states.shape
        step = max(1, TILE.get(hidden_states.device.type, TILE["cuda"]) // batch)
        if torch.is_grad_enabled() or self._widefield.observer is not None:
            step = length
        return (slice(start, min(start + step, length)) for start in range(0, length, step))

    def _convolve(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        silu = self.activation in _SILU
        x, state = ops.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=silu, initial_state=state
        )
        return x if silu else self.act(x), state

    def _scan_inputs(
        self, hidden_states: Tensor, conv_state: Tensor | None, valid: Tensor | None
    ) -> tuple[ScanInputs, Tensor]:
        if valid is not None:
            hidden_states = hidden_states * valid[..., None]
        x, z = self.project(hidden_states)
        x, conv_state = self._convolve(x, conv_state)
        if valid is not None:
            x = x * valid[..., None]
        delta, B, C = self.selective_inputs(x)
        inputs = ScanInputs(
            x=x,
            delta=delta,
            A=self.rates,
            B=B,
            C=C,
            D=self.D.float().flatten(),
            z=z,
            delta_bias=self.delta_bias,
            valid=valid,
        )
        return inputs, conv_state

    def _offer(
        self, survivors: Survivors, inputs: ScanInputs, pool: Pool, residual: Tensor
    ) -> None:
        tokens = {"x": inputs.x, "delta": inputs.delta, "B": inputs.B, "C": inputs.C}
        assert inputs.z is not None
        try:
            survivors.add(
                ops.token_score(inputs, pool),
                inputs.valid,
                {**tokens, "z": inputs.z, "residual": residual},
            )
        except WidefieldError as error:
            raise WidefieldError(f"layer {self.layer_idx}: {error}") from None

    def _state(self, past: LayerCache | None) -> Tensor | None:
        """The recurrent state (B, D, N), a view of what the cache holds."""
        if past is None or past.state is None:
            return None
        return past.state.view(past.batch, -1, self.ssm_state_size)

    def _close(
        self,
        past: LayerCache | None,
        plan: LayerPlan | None,
        conv_state: Tensor,
        state: Tensor,
        lengths: tuple[int, ...],
    ) -> None:
        """Check the state behind the last token and leave it in the cache."""
        if plan is not None and plan.touches_scan and not bool(torch.isfinite(state).all()):
            raise WidefieldError(
                f"layer {self.layer_idx}: the state is not finite after the scan (non-finite Δ "
                "or input); "
                "check the model's weights and its dtype (float32 is safest)"
            )
        if past is not None:
            past.store(conv_state, state.view(past.batch, *self.A_log.shape), lengths)

    def _step(self, hidden_states: Tensor, past: LayerCache) -> Tensor:
        x, z = self.project(hidden_states)
        x, conv_state = self._convolve(x, past.conv_state)
        delta, B, C = self.selective_inputs(x)
        state = self._state(past)
        assert state is not None
        y = ops.selective_state_update(
            state,
            x[:, 0],
            delta[:, 0],
            self.rates,
            B[:, 0],
            C[:, 0],
            self.D.float().flatten(),
            z[:, 0],
            self.delta_bias,
        )
        past.store(conv_state, None, (1,))
        return self.out_proj(y[:, None].to(hidden_states.dtype))


class NormedMamba1Mixer(Mamba1Mixer):
    """The same for mixers that norm Δ's low rank, B and C."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def norm_inputs(self, low_rank: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each through its own norm."""
        return self.dt_layernorm(low_rank), self.b_layernorm(B), self.c_layernorm(C)


def _room(output: Tensor | None, piece: Tensor, length: int) -> Tensor:
    """What the pieces of an output are written to, made when the first one is there."""
    if output is not None:
        return output
    return piece.new_empty(piece.shape[0], length, *piece.shape[2:])


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
        if hidden_states.shape[1] == 0:
            return hidden_states  # an earlier layer holds the tokens back until the last chunk
        residual = hidden_states
        normed = self.norm(hidden_states.to(self.norm.weight.dtype))  # type: ignore[arg-type]
        if self.residual_in_fp32:
            residual = residual.to(torch.float32)
        note = shortened(hidden_states)
        mixed = self.mixer.mix(normed, residual, cache_params, attention_mask, note)
        return carry(mixed.residual + mixed.output, mixed.note)
