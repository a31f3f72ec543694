"""One decode step: of the convolution, of the selective scan, and of the scan of Mamba-2."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.state_update import reference

__all__ = [
    "causal_conv1d_update",
    "low_rank_state_update",
    "selective_state_update",
    "ssd_state_update",
]


def causal_conv1d_update(
    state: Float[Tensor, "batch channels kernel"],
    x: Float[Tensor, "batch channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
) -> Float[Tensor, "batch channels"]:
    """Push one more input into the state of a short convolution, in place.

    Args:
        state: the last K inputs, updated in place.
        x: the input that comes in.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.

    Returns:
        That token's y (B, D), in the dtype of x.
    """
    step = reference.causal_conv1d_update
    backend = _choose(state, x, weight, bias)
    if backend == "cpu":
        from widefield.ops.state_update import cpu

        step = cpu.causal_conv1d_update
    elif backend == "cuda":
        from widefield.ops.state_update import cuda

        step = cuda.causal_conv1d_update
    return step(state, x, weight, bias, silu=silu)


def selective_state_update(
    state: Float[Tensor, "batch channels state"],
    x: Float[Tensor, "batch channels"],
    delta: Float[Tensor, "batch channels"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state"],
    C: Float[Tensor, "batch *groups state"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
    *,
    delta_softplus: bool = True,
) -> Float[Tensor, "batch channels"]:
    """Advance `state` by one token, in place. Decode steps are never filtered: no plan.

    Args:
        state: updated in place; float32 keeps long decodes exact.
        x: what is written into the state.
        delta: raw Δ before bias and softplus.
        A: negative decay rates.
        B: input projection of the token; with groups, the channels are that many equal parts.
        C: output projection of the token, like B.
        D: skip connection, or None.
        z: gate before its silu, or None.
        delta_bias: added to `delta`, or None.
        delta_softplus: whether Δ = softplus(delta + bias).

    Returns:
        That token's y (B, D), in the dtype of x.
    """
    step = reference.selective_state_update
    backend = _choose(state, x, delta, A, B, C, D, z, delta_bias)
    if backend == "cpu":
        from widefield.ops.state_update import cpu

        step = cpu.selective_state_update
    elif backend == "cuda":
        from widefield.ops.state_update import cuda

        step = cuda.selective_state_update
    return step(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus)


def low_rank_state_update(
    state: Float[Tensor, "batch channels state"],
    x: Float[Tensor, "batch channels"],
    low_rank: Float[Tensor, "batch rank"],
    delta_weight: Float[Tensor, "channels rank"],
    A_log: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state"],
    C: Float[Tensor, "batch *groups state"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels"]:
    """Advance `state` by one token, in place, from Δ's low rank and the logarithms of the rates.

    Args:
        state: updated in place; float32 keeps long decodes exact.
        x: what is written into the state.
        low_rank: what Δ is projected from.
        delta_weight: raw Δ is this times `low_rank`.
        A_log: log(-A).
        B: input projection of the token.
        C: output projection of the token.
        D: skip connection, or None.
        z: gate before its silu, or None.
        delta_bias: added to Δ in front of its softplus, or None.

    Returns:
        That token's y (B, D), in the dtype of x.
    """
    step = reference.low_rank_state_update
    if _choose(state, x, low_rank, delta_weight, A_log, B, C, D, z, delta_bias) == "cuda":
        from widefield.ops.state_update import cuda

        step = cuda.low_rank_state_update
    return step(state, x, low_rank, delta_weight, A_log, B, C, D, z, delta_bias)


def ssd_state_update(
    state: Float[Tensor, "batch heads width state"],
    x: Float[Tensor, "batch heads width"],
    delta: Float[Tensor, "batch heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch groups state"],
    C: Float[Tensor, "batch groups state"],
    D: Float[Tensor, " heads"] | None = None,
    delta_bias: Float[Tensor, " heads"] | None = None,
    *,
    delta_softplus: bool = True,
    delta_limit: tuple[float, float] = (0.0, math.inf),
    log_rates: bool = False,
) -> Float[Tensor, "batch heads width"]:
    """Advance `state` of Mamba-2 by one token, in place. Decode steps are never filtered: no plan.

    Args:
        state: updated in place; float32 keeps long decodes exact.
        x: what is written into the state.
        delta: raw Δ before bias and softplus.
        A: negative decay rates.
        B: input projection of the token, one per group of heads.
        C: output projection of the token, one per group of heads.
        D: skip connection, or None.
        delta_bias: added to `delta`, or None.
        delta_softplus: whether Δ = softplus(delta + bias).
        delta_limit: smallest and largest Δ that the model allows; (0, inf) for no limit.
        log_rates: whether A holds log(-A), as a model's parameter does.

    Returns:
        That token's y (B, H, P), in the dtype of x.
    """
    step = reference.ssd_state_update
    backend = _choose(state, x, delta, A, B, C, D, delta_bias)
    if backend == "cpu":
        from widefield.ops.state_update import cpu

        step = cpu.ssd_state_update
    elif backend == "cuda":
        from widefield.ops.state_update import cuda

        step = cuda.ssd_state_update
    return step(
        *(state, x, delta, A, B, C, D, delta_bias),
        delta_softplus=delta_softplus,
        delta_limit=delta_limit,
        log_rates=log_rates,
    )


def _choose(*tensors: Tensor | None) -> str:
    """Kernels write the state in place and know no gradients: the reference where one is wanted."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return "reference" if wanted else choose(*tensors)
