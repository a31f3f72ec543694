"""Blocks whose mixer drops tokens, and whatever stands behind them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from widefield import ops
from widefield.families._attention import fit_mask
from widefield.families._context import Left, is_bare, left_of, mark_left
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
        ready = _take_normed(hidden_states, norm)
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
        if not self.training and is_bare(self):
            return self.run(hidden_states, *args, **kwargs)
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output (B, L, H), or (B, k, H) if its mixer drops tokens."""
        return self.run(hidden_states, *args, **kwargs)

    def run(
        self, hidden_states: Tensor, *args: Any, widefield_left: Left | None = None, **kwargs: Any
    ) -> Any:
        """The same without what transformers puts around a forward."""
        if hidden_states.shape[1] == 0:
            return hidden_states  # an earlier layer holds the tokens back until the last chunk
        left = widefield_left
        for child in self._modules.values():
            if isinstance(child, Mixer):
                return self._mixed(child, hidden_states, left, args, kwargs)
            if child is not None and "q_proj" in child._modules:
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
        out = self.mixer(self.normed(hidden_states), cache_params=cache, attention_mask=turn)
        follower = self.__dict__.get("_widefield_follower")
        dtype = torch.promote_types(hidden_states.dtype, out.dtype)
        dtype = torch.promote_types(dtype, torch.float32) if self.residual_in_fp32 else dtype
        if isinstance(follower, Norm) and is_bare(follower) and self._is_followed(out):
            return _add_and_norm(hidden_states, out, follower, dtype)
        return hidden_states.to(dtype) + out

    def _is_followed(self, out: Tensor) -> bool:
        """Whether the sum comes to the next block as it is, or the next block can tell.

        What is made in inference mode has no version to tell by: there, nobody may stand between
        the two blocks.
        """
        if not out.is_inference():
            return True
        following = self.__dict__["_widefield_next"]
        return following is not None and is_bare(self) and is_bare(following)


def chain_blocks(model: nn.Module) -> None:
    """Tell the blocks of a model that only add to the stream whose norm comes next."""
    for parent in model.modules():
        # Between two blocks of its own models transformers writes into nothing.
        known = type(parent).__module__.startswith("transformers.models.")
        for stack in parent._modules.values():
            if isinstance(stack, nn.ModuleList):
                for block, following in itertools.pairwise(stack):
                    if isinstance(block, ResidualBlock) and isinstance(following, ResidualBlock):
                        own = block.__dict__  # they are none of its submodules
                        own["_widefield_follower"] = following.norm
                        own["_widefield_next"] = following if known else None


def _add_and_norm(hidden_states: Tensor, out: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """The sum, which carries its norm along to the next block."""
    width = norm.weight.dtype
    total, normed = ops.add_rms_norm(
        hidden_states, out, norm.weight, norm.variance_epsilon, sum_dtype=dtype, dtype=width
    )
    total._widefield_normed = (norm, normed, _version(total))  # type: ignore[attr-defined]
    return total


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _take_normed(hidden_states: Tensor, norm: nn.Module) -> Tensor | None:
    """What the block before has already normed, if it is still the norm of these values."""
    ready = getattr(hidden_states, "_widefield_normed", None)
    if ready is None:
        return None
    del hidden_states._widefield_normed  # type: ignore[attr-defined]
    kept, normed, version = ready
    return normed if kept is norm and version == _version(hidden_states) else None


def _left_behind(turn: Turn) -> Left | None:
    """What a mixer has left of the tokens."""
    if turn.kept is not None:
        return Left(turn.kept.rows.valid, dropped=True)
    return None if turn.padding is None else Left(turn.padding.valid, turn.dropped)
