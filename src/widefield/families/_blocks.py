"""Blocks whose mixer drops tokens, and whatever stands behind them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from widefield import ops
from widefield.families._attention import fit_mask
from widefield.families._context import Left, left_of, mark_left
from widefield.families._mixer import Mixer, Turn, steps_in_few_kernels
from widefield.families._norms import Norm


class DroppingBlock(nn.Module):
    """Mixed into a transformers block class: what its mixer drops is gone for later blocks.

    A block that drops nothing runs as transformers has it. One that does lets its mixer choose
    first, and then runs on the chosen rows of its input. While the chosen ones can still be pushed
    out by later chunks, it hands on an empty sequence, and so do all later blocks.
    """

    def normed(self, hidden_states: Tensor) -> Tensor:
        """What the block gives its mixer to read."""
        norm: Any = self.norm
        ready = _take_normed(hidden_states, norm, self)
        if ready is not None:
            return ready
        if isinstance(norm, Norm):
            return norm(hidden_states, dtype=norm.weight.dtype)
        return norm(hidden_states.to(norm.weight.dtype))

    def body(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block of transformers does with its input, whole or shortened."""
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As an argument the mark outlives a move to another device in front of `forward`."""
        left = left_of(hidden_states)
        if left is not None:
            kwargs["widefield_left"] = left
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, *args: Any, widefield_left: Left | None = None, **kwargs: Any
    ) -> Any:
        """The block's output (B, L, H), or (B, k, H) if its mixer drops tokens."""
        if hidden_states.shape[1] == 0:
            return hidden_states  # an earlier layer holds the tokens back until the last chunk
        left = widefield_left
        for child in self.children():
            if isinstance(child, Mixer):
                return self._mixed(child, hidden_states, left, args, kwargs)
            if hasattr(child, "q_proj"):
                kwargs = fit_mask(child, hidden_states, left, kwargs)
        return mark_left(self.body(hidden_states, *args, **kwargs), left)

    def _mixed(
        self,
        mixer: Mixer,
        hidden_states: Tensor,
        left: Left | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        cache = kwargs.get("cache_params", kwargs.get("past_key_values"))
        turn = mixer.begin(hidden_states, cache, kwargs.get("attention_mask"), left)
        if turn.shortens:
            turn.residual = hidden_states
            mixer(self.normed(hidden_states), cache_params=cache, attention_mask=turn)
            if turn.kept is None:
                return hidden_states[:, :0]
            assert turn.kept.residual is not None
            hidden_states = turn.kept.residual
        kwargs = {**kwargs, "attention_mask": turn}
        out = self.body(hidden_states, *args, **kwargs)
        return mark_left(out, _left_behind(turn))


class ResidualBlock(DroppingBlock):
    """A block that adds its mixer's output to its input, and does nothing else.

    Where the next block is of this kind, too, its norm is taken in the same pass as the sum.
    """

    residual_in_fp32: bool
    mixer: Mixer
    norm: nn.Module

    def body(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output; without the copies of the residual stream in other dtypes."""
        if args or torch.is_grad_enabled() or not ops.runs_kernels(hidden_states):
            return super().body(hidden_states, *args, **kwargs)
        cache, turn = kwargs.get("cache_params"), kwargs.get("attention_mask")
        past = turn.past if isinstance(turn, Turn) and turn.padding is None else None
        norm: Any = self.norm
        if past is not None and steps_in_few_kernels(norm, self.mixer, hidden_states):
            dtype = torch.float32 if self.residual_in_fp32 else hidden_states.dtype
            return self.mixer.block_step(hidden_states, norm, past, dtype)
        follower = self._next_norm()
        if isinstance(turn, Turn):
            turn.scales_later = follower is not None and _is_seen_by_nobody(self.mixer)
        out = self.mixer(self.normed(hidden_states), cache_params=cache, attention_mask=turn)
        dtype = torch.promote_types(hidden_states.dtype, out.dtype)
        dtype = torch.promote_types(dtype, torch.float32) if self.residual_in_fp32 else dtype
        if follower is None:
            return hidden_states.to(dtype) + out
        scale = turn.scale if isinstance(turn, Turn) else None
        return _add_and_norm(hidden_states, out, scale, follower, dtype)

    def _next_norm(self) -> Norm | None:
        """The norm that reads this block's output and nothing else does before, or None."""
        norm = self.__dict__.get("_widefield_follower")
        if not (isinstance(norm, Norm) and _is_seen_by_nobody(norm)):
            return None
        # Tensors of inference mode do not tell whether they have been changed on the way.
        return None if torch.is_inference_mode_enabled() and not _is_seen_by_nobody(self) else norm


def chain_blocks(model: nn.Module) -> None:
    """Tell the blocks of a model that only add to the stream whose norm comes next."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for block, following in itertools.pairwise(stack):
                if isinstance(block, ResidualBlock) and isinstance(following, ResidualBlock):
                    block.__dict__["_widefield_follower"] = following.norm  # not its submodule


def _is_seen_by_nobody(module: nn.Module) -> bool:
    """Whether calling a module is nothing but its forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not (hooks or "_old_forward" in vars(module))


def _add_and_norm(
    hidden_states: Tensor, out: Tensor, scale: Tensor | None, norm: Norm, dtype: torch.dtype
) -> Tensor:
    """The sum, which carries its norm along to the next block."""
    width = norm.weight.dtype
    total, normed = ops.add_rms_norm(
        hidden_states, out, norm.weight, norm.variance_epsilon,
        scale=scale, sum_dtype=dtype, dtype=width,
    )  # fmt: skip
    version = None if total.is_inference() else total._version
    total._widefield_normed = (norm, normed, version)  # type: ignore[attr-defined]
    return total


def _take_normed(hidden_states: Tensor, norm: nn.Module, block: nn.Module) -> Tensor | None:
    """What the block before has already normed, if it is still the norm of these values."""
    ready = getattr(hidden_states, "_widefield_normed", None)
    if ready is None:
        return None
    del hidden_states._widefield_normed  # type: ignore[attr-defined]
    kept, normed, version = ready
    known = _is_seen_by_nobody(block) if version is None else version == hidden_states._version
    return normed if kept is norm and known else None


def _left_behind(turn: Turn) -> Left | None:
    """What a mixer has left of the tokens."""
    if turn.kept is not None:
        return Left(turn.kept.rows.valid, dropped=True)
    return None if turn.padding is None else Left(turn.padding.valid, turn.dropped)
