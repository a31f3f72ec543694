"""One decode step: of the selective scan, and of the scan of Mamba-2."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from widefield.ops._backend import choose
from widefield.ops.state_update import reference

__all__ = ["selective_state_update", "ssd_state_update"]


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
    if choose(state, x, delta, A, B, C, z) == "cpu":
        from widefield.ops.state_update import cpu

        step = cpu.selective_state_update
    return step(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus)


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

    Returns:
        That token's y (B, H, P), in the dtype of x.
    """
    step = reference.ssd_state_update
    if choose(state, x, delta, A, B, C) == "cpu":
        from widefield.ops.state_update import cpu

        step = cpu.ssd_state_update
    return step(
        *(state, x, delta, A, B, C, D, delta_bias),
        delta_softplus=delta_softplus,
        delta_limit=delta_limit,
    )
