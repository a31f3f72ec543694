"""Depthwise causal convolution with state: one signature, three implementations."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.causal_conv1d import reference

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
    initial_state: Float[Tensor, "batch channels kernel"] | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch channels kernel"]]:
    """Causal depthwise convolution over the length, continuing from a state.

    Args:
        x: inputs, any floating dtype.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.
        initial_state: the last K inputs before x (as transformers caches them), or None for zeros.

    Returns:
        y (B, L, D) in the dtype of x, and the last K inputs (B, D, K) in the dtype of x.
    """
    backend = choose(x, weight)
    if backend == "cpu":
        from widefield.ops.causal_conv1d import cpu

        return cpu.causal_conv1d(x, weight, bias, silu=silu, initial_state=initial_state)
    if backend == "cuda":
        from widefield.ops.causal_conv1d import cuda

        return cuda.causal_conv1d(x, weight, bias, silu=silu, initial_state=initial_state)
    return reference.causal_conv1d(x, weight, bias, silu=silu, initial_state=initial_state)
