"""One decode step on the CPU: one kernel instead of a dozen torch ops."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._numba import (
    BYTES,
    WIDTH,
    Kernel,
    arguments,
    exp,
    fma,
    full,
    inlined,
    load_one,
    load_some,
    next_task,
    silu,
    softplus,
    store_number,
    store_some,
    sum_of_lanes,
    where,
)
from widefield.ops.causal_conv1d import cpu as convolution
from widefield.ops.state_update import reference


def causal_conv1d_update(
    state: Float[Tensor, "batch channels kernel"],
    x: Float[Tensor, "batch channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
) -> Float[Tensor, "batch channels"]:
    """Push one more input into `state`, in place; with the signature of the reference.

    Args:
        state: the last K inputs, updated in place.
        x: the input that comes in.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.

    Returns:
        That token's y, in the dtype of x.
    """
    y, new = convolution.causal_conv1d(x[:, None], weight, bias, silu=silu, initial_state=state)
    state.copy_(new)
    return y[:, 0]


@inlined
def _step(
    row, channels, size, apply_softplus, y, state, x, x_row, delta, delta_row, z, z_row,
    B, B_row, C, C_row, A, D, bias,
):  # fmt: skip
    """Advance the state (D, N) of one row in place; its y (D,) holds Δ on the way.

    An address of 0 stands for no D, z or bias.
    """
    y += row * channels * BYTES
    state += row * channels * size * BYTES
    x += row * x_row * BYTES
    for block in range(0, channels, WIDTH):
        count, here = channels - block, block * BYTES
        step = load_some(delta + row * delta_row * BYTES + here, count)
        if bias != 0:
            step = step + load_some(bias + here, count)
        if apply_softplus != 0:
            step = softplus(step)
        store_some(y + here, step, count)
    for d in range(channels):
        step = load_one(y + d * BYTES)
        written = step * load_one(x + d * BYTES)
        total = full(0.0)
        for n in range(0, size, WIDTH):
            count, here = size - n, n * BYTES
            h = state + d * size * BYTES + here
            decay = exp(step * load_some(A + d * size * BYTES + here, count))
            new = written * load_some(B + row * B_row * BYTES + here, count)
            new = fma(decay, load_some(h, count), new)
            store_some(h, new, count)
            total = fma(new, load_some(C + row * C_row * BYTES + here, count), total)
        store_number(y + d * BYTES, sum_of_lanes(total))
    for block in range(0, channels, WIDTH):
        count, here = channels - block, block * BYTES
        total = load_some(y + here, count)
        if D != 0:
            total = fma(load_some(D + here, count), load_some(x + here, count), total)
        if z != 0:
            total = total * silu(load_some(z + row * z_row * BYTES + here, count))
        store_some(y + here, total, count)


@Kernel
def _update(call):
    while True:
        row = next_task(call)
        if row < 0:
            return
        _step(row, *arguments(call, 18))


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
    """Advance `state` by one token, in place; with the signature of the reference.

    Args:
        state: updated in place; a state that is not dense float32 goes through the reference, and
            so do groups.
        x: what is written into the state.
        delta: raw Δ before bias and softplus.
        A: negative decay rates.
        B: input projection of the token.
        C: output projection of the token.
        D: skip connection, or None.
        z: gate before its silu, or None.
        delta_bias: added to `delta`, or None.
        delta_softplus: whether Δ = softplus(delta + bias).

    Returns:
        That token's y, in the dtype of x.
    """
    if state.dtype != torch.float32 or not state.is_contiguous() or B.ndim == 3:
        return reference.selective_state_update(
            state, x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus
        )
    with torch.no_grad():
        rows, channels, size = state.shape
        y = torch.empty(rows, channels)
        # The names keep widened copies alive until the kernel has read them.
        wide_x, wide_delta, wide_B, wide_C = (_wide(t) for t in (x, delta, B, C))
        wide_z, wide_D, wide_bias = (None if t is None else _wide(t) for t in (z, D, delta_bias))
        rates = A.float().contiguous()
        _update(
            rows,
            *(channels, size, delta_softplus, y.data_ptr(), state.data_ptr()),
            *(*_address(wide_x), *_address(wide_delta), *_address(wide_z)),
            *(*_address(wide_B), *_address(wide_C)),
            *(rates.data_ptr(), _address(wide_D)[0], _address(wide_bias)[0]),
        )
    return y.to(x.dtype)


@inlined
def _step_head(
    task, heads, share, width, size, apply_softplus, limits,
    y, state, x, x_row, x_head, delta, delta_row, B, B_row, B_group, C, C_row, C_group, A, D, bias,
):  # fmt: skip
    """Advance the state (P, N) of one head in place, and write its y (P,).

    An address of 0 stands for no D or bias.
    """
    row, head = task // heads, task % heads
    step = load_one(delta + (row * delta_row + head) * BYTES)
    if bias != 0:
        step = step + load_one(bias + head * BYTES)
    if apply_softplus != 0:
        step = softplus(step)
    least, most = load_one(limits), load_one(limits + BYTES)
    step = where(step < least, least, step)
    step = where(most < step, most, step)
    decay = exp(step * load_one(A + head * BYTES))
    skip = load_one(D + head * BYTES) if D != 0 else full(0.0)
    B += (row * B_row + head // share * B_group) * BYTES
    C += (row * C_row + head // share * C_group) * BYTES
    for p in range(width):
        token = load_one(x + (row * x_row + head * x_head + p) * BYTES)
        written = step * token
        h = state + (task * width + p) * size * BYTES
        total = full(0.0)
        for n in range(0, size, WIDTH):
            count, here = size - n, n * BYTES
            new = fma(decay, load_some(h + here, count), written * load_some(B + here, count))
            store_some(h + here, new, count)
            total = fma(new, load_some(C + here, count), total)
        total = fma(skip, token, full(sum_of_lanes(total)))
        store_some(y + (task * width + p) * BYTES, total, 1)


@Kernel
def _update_heads(call):
    while True:
        task = next_task(call)
        if task < 0:
            return
        _step_head(task, *arguments(call, 22))


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
    """Advance `state` of Mamba-2 by one token, in place; with the signature of the reference.

    Args:
        state: updated in place; a state that is not dense float32 goes through the reference.
        x: what is written into the state.
        delta: raw Δ before bias and softplus.
        A: negative decay rates.
        B: input projection of the token, one per group of heads.
        C: output projection of the token, one per group of heads.
        D: skip connection, or None.
        delta_bias: added to `delta`, or None.
        delta_softplus: whether Δ = softplus(delta + bias).
        delta_limit: smallest and largest Δ that the model allows.
        log_rates: whether A holds log(-A).

    Returns:
        That token's y, in the dtype of x.
    """
    if state.dtype != torch.float32 or not state.is_contiguous():
        return reference.ssd_state_update(
            *(state, x, delta, A, B, C, D, delta_bias),
            delta_softplus=delta_softplus,
            delta_limit=delta_limit,
            log_rates=log_rates,
        )
    with torch.no_grad():
        A = -torch.exp(A.float()) if log_rates else A
        rows, heads, width, size = state.shape
        y = torch.empty(rows, heads, width)
        # The names keep widened copies alive until the kernel has read them.
        wide_x, wide_delta, wide_B, wide_C, rates = (_wide(t) for t in (x, delta, B, C, A))
        wide_D, wide_bias = (None if t is None else _wide(t) for t in (D, delta_bias))
        if delta_limit == (0.0, math.inf):  # which is to say none, even for a negative Δ
            delta_limit = (-math.inf, math.inf)
        limits = torch.tensor(delta_limit)
        _update_heads(
            rows * heads,
            *(heads, heads // B.shape[1], width, size, delta_softplus, limits.data_ptr()),
            *(y.data_ptr(), state.data_ptr(), wide_x.data_ptr(), *wide_x.stride()[:2]),
            *(*_address(wide_delta), wide_B.data_ptr(), *wide_B.stride()[:2]),
            *(wide_C.data_ptr(), *wide_C.stride()[:2]),
            *(rates.data_ptr(), _address(wide_D)[0], _address(wide_bias)[0]),
        )
    return y.to(x.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """As float32 with a dense last dimension."""
    wide = tensor.float()
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _address(tensor: Tensor | None) -> tuple[int, int]:
    """Address and stride of the rows; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
