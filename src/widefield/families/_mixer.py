"""What mixers of both generations do with a prompt: walk it in tiles, scan it, choose tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from widefield import ops
from widefield.errors import WidefieldError
from widefield.families._context import (
    LayerCache,
    Left,
    Link,
    Padding,
    check_finite,
    check_whole,
    derived,
    is_bare,
    padding_of,
    plan_of,
    scattered,
    uncompiled,
)
from widefield.families._norms import GatedNorm, Norm
from widefield.ops import Rows, Survivors
from widefield.plan import LayerPlan, ScanInputs, SSDInputs

Inputs = ScanInputs | SSDInputs
# Tokens of all rows that a mixer holds in between at a time, where nobody needs them whole.
TILE = {"cpu": 4096, "cuda": 1 << 16}
# Cut at a multiple of this, the CPU's scan of Mamba-2 gives the same bits as in one piece.
_EVEN = 64
_SILU = ("silu", "swish")
_SEQUENCES = ("x", "delta", "B", "C", "z")


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of the sequence.

    Attributes:
        part: which tokens.
        inputs: what the scan reads there, without a state.
        gate: (B, n, channels) where the gate is no part of the scan, else None.
        conv_state: (B, D, K) of the convolution behind it.
    """

    part: slice
    inputs: Inputs
    gate: Tensor | None
    conv_state: Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens that a mixer has chosen, with what it takes to go on with them alone.

    Attributes:
        rows: which they are.
        residual: (B, k, width) the block's input there, or None if the block goes on with all.
        inputs: what the scan reads there.
        gate: as in `Tile`.
        conv_state: of the convolution behind the last of all tokens.
    """

    rows: Rows
    residual: Tensor | None
    inputs: Inputs
    gate: Tensor | None
    conv_state: Tensor


@dataclass(slots=True)
class Turn:
    """One forward of one mixer, and what its block and it tell each other of dropped tokens.

    A block may give it to its mixer instead of the attention mask, which every block of
    transformers hands on as it is.

    Attributes:
        past: this layer's part of the cache, or None.
        padding: of the mixer's input; None for a decode step.
        plan: of this layer.
        dropped: whether earlier layers have dropped tokens in this forward.
        residual: (B, L, width) the block's input, where the mixer is to choose tokens and no more.
        kept: what it has chosen; None as long as more chunks are to come.
        scales_later: whether the block multiplies the mixer's output with `scale`, if there is one.
        scale: (B, L) float32 what the rows of the output are still to be multiplied with, or None.
    """

    past: LayerCache | None
    padding: Padding | None = None
    plan: LayerPlan | None = None
    dropped: bool = False
    residual: Tensor | None = None
    kept: Kept | None = None
    scales_later: bool = False
    scale: Tensor | None = None

    @property
    def shortens(self) -> bool:
        """Whether later layers shall not see the tokens that this one drops."""
        pool = None if self.plan is None else self.plan.pool
        return pool is not None and not pool.scatter


class Mixer(nn.Module):
    """Mixed into a transformers mixer class: the same weights, our scan, and the layer's plan.

    A generation says how a piece of the input is read and scanned and how one token is decoded; its
    `forward` is `run_with` the names of the weights that are used without calling their modules.
    """

    _widefield: Link
    layer_idx: int
    activation: str
    act: nn.Module
    conv1d: nn.Conv1d
    in_proj: nn.Linear
    out_proj: nn.Linear

    def read(
        self, hidden_states: Tensor, conv_state: Tensor | None, valid: Tensor | None
    ) -> tuple[Inputs, Tensor | None, Tensor]:
        """The scan's inputs, the gate if it is none of them, the convolution's new state."""
        raise NotImplementedError

    def scan(
        self, inputs: Any, gate: Any, plan: LayerPlan | None
    ) -> tuple[Float[Tensor, "batch length channels"], Tensor]:
        """What `out_proj` reads, and the state behind the last token."""
        raise NotImplementedError

    def scan_unscaled(
        self, inputs: Any, gate: Any, plan: LayerPlan | None
    ) -> tuple[
        Float[Tensor, "batch length channels"], Tensor, Float[Tensor, "batch length"] | None
    ]:
        """The same, and what the rows of `out_proj`'s output are to be multiplied with, or None."""
        return (*self.scan(inputs, gate, plan), None)

    def step(self, hidden_states: Tensor, past: LayerCache) -> Tensor:
        """The output for one more token a row; the states in the cache go on."""
        raise NotImplementedError

    @property
    def used_in_a_step(self) -> tuple[nn.Module, ...]:
        """The modules whose weights `block_step` reads; none where there is no such step."""
        return ()

    def block_step(
        self, hidden_states: Tensor, norm: Norm, past: LayerCache, dtype: torch.dtype
    ) -> Tensor:
        """norm, mixer and residual for one more token a row, in a few kernels."""
        raise NotImplementedError

    def projected(
        self, hidden_states: Tensor, norm: Norm, past: LayerCache, first: int = 0
    ) -> Tensor:
        """What `in_proj` makes of the normed token, (B, n), the convolution's part convolved."""
        assert past.conv_state is not None
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        return ops.project(
            *(hidden_states[:, 0], self.in_proj.weight, self.in_proj.bias),
            norm=norm.weight,
            eps=norm.variance_epsilon,
            convolution=ops.Convolution(past.conv_state, taps, bias, first),
            dtype=self.in_proj.weight.dtype,
        )

    def added(self, y: Tensor, hidden_states: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        """What `out_proj` makes of y, added to the block's input (B, 1, H)."""
        weight, bias = self.out_proj.weight, self.out_proj.bias
        residual = hidden_states[:, 0]
        return ops.project(y, weight, bias, residual=residual, dtype=dtype, **options)[:, None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mixer; on the shortest way where nobody looks on."""
        if not is_bare(self):
            return super().__call__(*args, **kwargs)
        for part in self._modules.values():
            if part is not None and "_hf_hook" in part.__dict__:
                return super().__call__(*args, **kwargs)
        return self.run(*args, **kwargs)

    def convolve(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The short convolution of x (B, L, D) with its activation, and its new state (B, D, K)."""
        silu = self.activation in _SILU
        weight, bias = weights_of(self.conv1d)
        taps = derived(self, "taps", weight, _taps)
        x, state = ops.causal_conv1d(x, taps, bias, silu=silu, initial_state=state)
        return x if silu else self.act(x), state

    def convolve_one(self, x: Tensor, past: LayerCache) -> Tensor:
        """The same for one token, x (B, 1, D); the state in the cache goes on."""
        assert past.conv_state is not None
        silu = self.activation in _SILU
        x = ops.causal_conv1d_update(
            past.conv_state, x[:, 0], self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=silu
        )[:, None]
        return x if silu else self.act(x)

    def state_of(self, past: LayerCache | None) -> Tensor | None:
        """The scan's state before this forward, or None for zeros; may be a view of the cache."""
        return None if past is None else past.state

    def begin(
        self,
        hidden_states: Tensor,
        cache: Any | None,
        mask: Tensor | None,
        left: Left | None = None,
    ) -> Turn:
        """What is known before the first token is read; needs no weight.

        Args:
            hidden_states: (B, L, width) of the mixer's block.
            cache: transformers cache, or None.
            mask: 2-D mask, left padding only, or None.
            left: what earlier layers have left of the tokens, where they say so.
        """
        begin = _begin_uncompiled if torch.compiler.is_compiling() else Mixer._begin
        return begin(self, hidden_states, cache, mask, left)

    def _begin(
        self, hidden_states: Tensor, cache: Any | None, mask: Tensor | None, left: Left | None
    ) -> Turn:
        batch, length, _ = hidden_states.shape
        dropped = left is not None and left.dropped
        past = None if cache is None else LayerCache(cache, self.layer_idx, batch)
        if past is not None and past.decodes(length, dropped):
            return Turn(past)
        padding = padding_of(hidden_states, mask, left, past)
        device = hidden_states.device
        plan = plan_of(self._widefield, self.layer_idx, past, padding, dropped, device)
        return Turn(past, padding, plan, dropped)

    def run(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | Turn | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mixer's output (B, L, width), 0 at dropped tokens.

        Args:
            hidden_states: (B, L, width) normed block input.
            cache_params: transformers cache, or None.
            attention_mask: 2-D mask, left padding only, or None; or the turn that a block has begun
                and goes on with. If that turn has a `residual`, the result means nothing.
            **kwargs: of transformers, not needed here.
        """
        turn = attention_mask
        if not isinstance(turn, Turn):
            turn = self.begin(hidden_states, cache_params, turn)
        if turn.padding is None:
            assert turn.past is not None
            return self.step(hidden_states, turn.past)
        if turn.kept is not None:
            return self._finish(turn.kept, turn, hidden_states.dtype)
        if turn.plan is None or turn.plan.pool is None:
            return self._prefill(hidden_states, turn)
        if turn.residual is not None:
            turn.kept = self._choose(hidden_states, turn)
            return hidden_states[:, :0]
        check_whole(turn.past, self.layer_idx)
        kept = self._choose(hidden_states, turn)
        assert kept is not None
        output = self._finish(kept, turn, hidden_states.dtype)
        return scattered(kept.rows, output, hidden_states.shape[1])

    def _prefill(self, hidden_states: Tensor, turn: Turn) -> Tensor:
        """One tile after the other, so that only the output is as long as the input."""
        parts = self._parts(hidden_states)
        if len(parts) == 1 and self._widefield.observer is None:
            return self._prefill_at_once(hidden_states, turn)
        state, output, tile, scales = self.state_of(turn.past), None, None, []
        for tile in self._tiles(hidden_states, turn):
            inputs = tile.inputs if state is None else tile.inputs.replace(initial_state=state)
            y, state, scale = self.scan_unscaled(inputs, tile.gate, turn.plan)
            scales += [] if scale is None else [scale]
            output = self._write(output, y.to(hidden_states.dtype), tile.part, hidden_states)
        assert output is not None and tile is not None and state is not None
        assert turn.padding is not None
        self._close(turn, tile.conv_state, state, turn.padding.lengths)
        return _scaled(output, turn, torch.cat(scales, dim=1) if scales else None)

    def _prefill_at_once(self, hidden_states: Tensor, turn: Turn) -> Tensor:
        """The same where one tile is all."""
        past, padding, conv_state, before = turn.past, turn.padding, None, None
        assert padding is not None
        if past is not None and past.filled:
            conv_state, before = past.conv_state, self.state_of(past)
        inputs, gate, conv_state = self.read(hidden_states, conv_state, padding.valid)
        if before is not None:
            inputs = inputs.replace(initial_state=before)
        y, state, scale = self.scan_unscaled(inputs, gate, turn.plan)
        output = linear(self.out_proj, y if y.dtype == hidden_states.dtype else y.to(hidden_states))
        self._close(turn, conv_state, state, padding.lengths)
        return _scaled(output, turn, scale)

    def _write(
        self, output: Tensor | None, y: Tensor, part: slice, hidden_states: Tensor
    ) -> Tensor:
        """The output with what belongs to these tokens; made when the first of them come."""
        batch, length, _ = hidden_states.shape
        if y.shape[1] == length:
            return linear(self.out_proj, y)
        if batch == 1 and ops.runs_kernels(y) and is_plain(self.out_proj, y):
            if output is None:
                output = y.new_empty(batch, length, self.out_proj.out_features)
            _linear_into(output[0, part], y[0], self.out_proj)
            return output
        piece = self.out_proj(y)
        output = _room(output, piece, length)
        output[:, part] = piece
        return output

    def _choose(self, hidden_states: Tensor, turn: Turn) -> Kept | None:
        """The best tokens of this prefill; None as long as more chunks are to come."""
        assert turn.plan is not None and turn.plan.pool is not None
        past, pool = turn.past, turn.plan.pool
        survivors = Survivors(pool) if past is None else past.survivors(pool)
        tile = None
        for tile in self._tiles(hidden_states, turn):
            tokens = {name: getattr(tile.inputs, name, None) for name in _SEQUENCES}
            residual = None if turn.residual is None else turn.residual[:, tile.part]
            tokens |= {"gate": tile.gate, "residual": residual}
            score = ops.token_score(tile.inputs, pool)
            present = {name: tensor for name, tensor in tokens.items() if tensor is not None}
            with self._named_in_errors():
                survivors.add(score, tile.inputs.valid, present)
        assert tile is not None
        if past is not None and past.more_to_come(turn.dropped):
            with self._named_in_errors():
                survivors.thin()
            past.store_conv(tile.conv_state)
            return None
        with self._named_in_errors():
            rows, tokens = survivors.take()
        residual, gate = tokens.pop("residual", None), tokens.pop("gate", None)
        state = self.state_of(past)
        inputs = tile.inputs.replace(**tokens, valid=rows.valid, initial_state=state)
        return Kept(rows, residual, inputs, gate, tile.conv_state)

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except WidefieldError as error:
            raise WidefieldError(f"layer {self.layer_idx}: {error}") from None

    def _finish(self, kept: Kept, turn: Turn, dtype: torch.dtype) -> Tensor:
        """The output for the chosen tokens, scanned as if they were all."""
        y, state = self.scan(kept.inputs, kept.gate, turn.plan)
        output = self.out_proj(y.to(dtype))
        lengths = Padding.of_valid(kept.rows.valid, output.shape[1]).lengths
        self._close(turn, kept.conv_state, state, lengths)
        return output

    def _tiles(self, hidden_states: Tensor, turn: Turn) -> Iterator[Tile]:
        """The scan's inputs tile by tile."""
        past, observer = turn.past, self._widefield.observer
        assert turn.padding is not None
        conv_state = None if past is None else past.conv_state
        for part in self._parts(hidden_states):
            valid = None if turn.padding.valid is None else turn.padding.valid[:, part]
            inputs, gate, conv_state = self.read(hidden_states[:, part], conv_state, valid)
            if observer is not None:
                observer(self.layer_idx, inputs.replace(initial_state=self.state_of(past)))
            yield Tile(part, inputs, gate, conv_state)

    def _parts(self, hidden_states: Tensor) -> Sequence[slice]:
        """Pieces of the sequence; one piece where gradients or an observer need it whole."""
        batch, length, _ = hidden_states.shape
        step = max(1, TILE["cpu" if hidden_states.is_cpu else "cuda"] // batch)
        step = step - step % _EVEN or step
        if length <= step or torch.is_grad_enabled() or self._widefield.observer is not None:
            return (slice(0, length),)
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]

    def _close(
        self, turn: Turn, conv_state: Tensor, state: Tensor, lengths: tuple[int, ...]
    ) -> None:
        """Check the state behind the last token and leave it in the cache."""
        if self._is_checked(turn, state):
            check_finite(state, self.layer_idx)
        if turn.past is not None:
            turn.past.store(conv_state, self.cached(state), lengths)

    def _is_checked(self, turn: Turn, state: Tensor) -> bool:
        """Whether to look at the state: on a GPU that waits for all work, so it is done once.

        A state that is not finite makes all that follows it so, up to the last layer's state.
        """
        if turn.plan is None or (turn.past is not None and turn.past.is_recorded):
            return False
        if state.is_cpu:
            return turn.plan.touches_scan
        return self.layer_idx == self._widefield.layout.layers[-1]

    def cached(self, state: Tensor) -> Tensor:
        """The scan's state in the shape that transformers caches."""
        return state


# The wrapper of torch.compile takes longer than the function: it stands where it is needed.
_begin_uncompiled = uncompiled(Mixer._begin)


def run_with(*used: str) -> Callable[..., Tensor]:
    """`Mixer.run`, which fetches these submodules first where accelerate keeps them elsewhere."""
    return uncompiled(force_accelerate_hooks(list(used))(Mixer.run))


def _scaled(output: Tensor, turn: Turn, scale: Tensor | None) -> Tensor:
    """The output, whose rows are multiplied here or left to the block."""
    if scale is None:
        return output
    if turn.scales_later:
        turn.scale = scale
        return output
    return output.mul_(scale[..., None])


def steps_in_few_kernels(norm: nn.Module, mixer: Mixer, x: Tensor) -> bool:
    """Whether norm, mixer and residual of a block may be computed without calling its modules."""
    used = mixer.used_in_a_step
    if not used or not isinstance(norm, Norm) or mixer.activation not in _SILU:
        return False
    known = (nn.Linear, nn.Conv1d, GatedNorm)
    if not all(type(module) in known or isinstance(module, GatedNorm) for module in used):
        return False
    if not all(is_bare(module) for module in (norm, mixer, *used)):
        return False
    kinds = {module.weight.dtype for module in (norm, *used)}
    in_autocast = torch.is_autocast_enabled(x.device.type)
    widest = max(mixer.in_proj.in_features, mixer.out_proj.in_features)
    return (
        len(kinds) == 1
        and not in_autocast
        and ops.projects_fast(mixer.in_proj.weight, x.shape[0], widest)
    )


def is_plain(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether calling the module with x is nothing but a product with its weights."""
    bare = type(module) is nn.Linear and is_bare(module)
    return bare and not torch.is_autocast_enabled(x.device.type)


def _taps(weight: Tensor) -> Tensor:
    """(D, K) of a depthwise convolution's weight."""
    return weight.squeeze(1)


def weights_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module, past the look-ups of `nn.Module` where it has its own."""
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a linear layer; without calling the module where nobody looks on."""
    if type(module) is nn.Linear and is_bare(module):
        return F.linear(x, *weights_of(module))
    return module(x)


def _linear_into(out: Tensor, x: Tensor, linear: nn.Linear) -> None:
    """The output of a linear layer (n, out) where it shall stand."""
    weight = linear.weight.t()
    if linear.bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(linear.bias, x, weight, out=out)


def _room(output: Tensor | None, piece: Tensor, length: int) -> Tensor:
    """What the pieces of an output are written to, made when the first one is there."""
    if output is not None:
        return output
    return piece.new_empty(piece.shape[0], length, *piece.shape[2:])
