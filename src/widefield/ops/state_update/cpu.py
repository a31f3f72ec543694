"""One decode step of the selective scan on the CPU: one kernel instead of a dozen torch ops."""

from __future__ import annotations

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
)
from widefield.ops.state_update import reference


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


def _wide(tensor: Tensor) -> Tensor:
    """As float32 with a dense last dimension."""
    wide = tensor.float()
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _address(tensor: Tensor | None) -> tuple[int, int]:
    """Address and stride of the rows; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
