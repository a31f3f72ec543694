"""Depthwise causal convolution with state: one signature, three implementations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.ops._backend import choose, on_gpu
from widefield.ops.causal_conv1d import reference

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
    initial_state: Float[Tensor, "sequences channels kernel"] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "sequences channels kernel"]]:
    """Causal depthwise convolution over the length, continuing from a state.

    Args:
        x: inputs, any floating dtype.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.
        initial_state: the last K inputs before x (as transformers caches them), or None for zeros.
        cu_seqlens: (S + 1,) int32 or int64, ascending from 0 to L, where the one row of x holds S
            sequences side by side, the i-th from token cu_seqlens[i] up to cu_seqlens[i + 1]; each
            starts from a state of its own. None where each row is one sequence.

    Returns:
        y (B, L, D) in the dtype of x, and the last K inputs (B, D, K) in the dtype of x. Packed
        sequences have S states, here and in `initial_state`.

    Raises:
        WidefieldError: if `cu_seqlens` does not fit x; what is in it is read on a CPU only.
    """
    if cu_seqlens is not None:
        _check_packed(x, cu_seqlens)
    backend = choose(x, weight)
    if backend == "cpu":
        from widefield.ops.causal_conv1d import cpu

        if cu_seqlens is not None:
            own = cpu.causal_conv1d
            return reference.by_sequence(own, x, weight, bias, silu, initial_state, cu_seqlens)
        return cpu.causal_conv1d(x, weight, bias, silu=silu, initial_state=initial_state)
    if backend == "cuda":
        return on_gpu("causal_conv1d").causal_conv1d(
            x, weight, bias, silu=silu, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
    return reference.causal_conv1d(
        x, weight, bias, silu=silu, initial_state=initial_state, cu_seqlens=cu_seqlens
    )


def _check_packed(x: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise WidefieldError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: expected int32 "
            "or int64 of shape (sequences + 1,)"
        )
    if x.shape[0] != 1:
        raise WidefieldError(
            f"cu_seqlens with {x.shape[0]} rows: expected one row that holds all sequences"
        )
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if not bounds or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, x.shape[1]):
            raise WidefieldError(
                f"cu_seqlens {bounds}: expected numbers that ascend from 0 to {x.shape[1]}, the "
                "length"
            )
