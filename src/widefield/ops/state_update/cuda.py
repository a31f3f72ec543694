"""One decode step on a GPU, in Triton: of the convolution and of both scans."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._early import early
from widefield.ops.state_update import reference
from widefield.ops.state_update._triton import exp, silu, softplus

# A tile never has fewer elements than its program has threads: two threads with the same element
# could read and write the state in any order.
_CHANNELS = 32
_TILE = 1024


@triton.jit
def _shift(
    state_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, channels, x_row, x_step,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = d < channels
    at = (row * channels + d) * K
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        if k < K - 1:
            value = tl.load(state_ptr + at + k + 1, mask=inside, other=0.0)
        else:
            newest = tl.load(x_ptr + row * x_row + d * x_step, mask=inside, other=0.0)
            value = newest.to(state_ptr.dtype.element_ty)
        tl.store(state_ptr + at + k, value, mask=inside)
        tap = tl.load(weight_ptr + d * K + k, mask=inside, other=0.0).to(tl.float32)
        total += tap * value.to(tl.float32)
    if SILU:
        total = silu(total)
    tl.store(y_ptr + row * channels + d, total.to(y_ptr.dtype.element_ty), mask=inside)


def causal_conv1d_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = True
) -> Tensor:
    """The convolution's step on a GPU; the same contract as the reference."""
    if not state.is_contiguous():
        return reference.causal_conv1d_update(state, x, weight, bias, silu=silu)
    batch, channels, kernel = state.shape
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _shift[(triton.cdiv(channels, _CHANNELS), batch)](
            state, x, weight.contiguous(), x if bias is None else bias, y, channels, *x.stride(),
            HAS_BIAS=bias is not None, SILU=silu, K=kernel, BLOCK=_CHANNELS, num_warps=1,
        )  # fmt: skip
    return y


@triton.jit
def _step(
    state_ptr, x_ptr, delta_ptr, rank_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr,
    channels, states, share, rank, x_row, x_step, delta_row, delta_step, z_row, z_step,
    B_row, B_group, B_step, C_row, C_group, C_step,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    RANK: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    # With a RANK, Δ comes as what dt_proj reads, dt_proj's weight beside it, and A as its log.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES).to(tl.int64)[None, :]
    inside = d < channels
    both = inside[:, None] & (n < states)
    at = (row * channels + d)[:, None] * states + n
    rate = tl.load(A_ptr + d[:, None] * states + n, mask=both, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK,), tl.float32)
    r = tl.arange(0, max(RANK, 1))
    weight = tl.zeros((BLOCK, max(RANK, 1)), rank_ptr.dtype.element_ty)
    if HAS_D:
        skip += tl.load(D_ptr + d, mask=inside, other=0.0).to(tl.float32)
    delta = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        delta += tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        rate = -exp(rate)
        taken = inside[:, None] & (r < rank)[None, :]
        weight = tl.load(rank_ptr + d[:, None] * rank + r[None, :], mask=taken, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    h = tl.load(state_ptr + at, mask=both, other=0.0)
    group = (d // share)[:, None]
    B = tl.load(B_ptr + row * B_row + group * B_group + n * B_step, mask=both, other=0.0)
    C = tl.load(C_ptr + row * C_row + group * C_group + n * C_step, mask=both, other=0.0)
    x = tl.load(x_ptr + row * x_row + d * x_step, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        low = tl.load(delta_ptr + row * delta_row + r * delta_step, mask=r < rank, other=0.0)
        delta += tl.sum(weight.to(tl.float32) * low.to(tl.float32)[None, :], axis=1)
    else:
        raw = tl.load(delta_ptr + row * delta_row + d * delta_step, mask=inside, other=0.0)
        delta += raw.to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    h = tl.fma(exp(delta[:, None] * rate), h, (delta * x)[:, None] * B.to(tl.float32))
    tl.store(state_ptr + at, h, mask=both)
    y = tl.sum(h * C.to(tl.float32), axis=1) + skip * x
    if HAS_Z:
        z = tl.load(z_ptr + row * z_row + d * z_step, mask=inside, other=0.0)
        y *= silu(z.to(tl.float32))
    tl.store(y_ptr + row * channels + d, y.to(y_ptr.dtype.element_ty), mask=inside)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = True,
) -> Tensor:
    """The scan's step on a GPU; a state that is not dense float32 goes through the reference."""
    if not _writable(state):
        return reference.selective_state_update(
            state, x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus
        )
    return _advanced(state, x, delta, None, A, B, C, D, z, delta_bias, delta_softplus)


def low_rank_state_update(
    state: Tensor,
    x: Tensor,
    low_rank: Tensor,
    delta_weight: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """The scan's step with Δ's projection; a state that is not dense float32: the reference."""
    if not _writable(state):
        return reference.low_rank_state_update(
            state, x, low_rank, delta_weight, A_log, B, C, D, z, delta_bias
        )
    return _advanced(state, x, low_rank, delta_weight, A_log, B, C, D, z, delta_bias, True)


def _advanced(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    delta_weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """One step; with `delta_weight`, `delta` is what it projects, and A is log(-A)."""
    batch, channels, size = state.shape
    states = triton.next_power_of_2(size)
    block = max(_TILE // 4 // states, 128 // states, 1)
    rank = 0 if delta_weight is None else delta_weight.shape[1]
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    B, C = (t[:, None] if t.ndim == 2 else t for t in (B, C))
    # Absent inputs are passed as x: their flag keeps the kernel from reading them.
    gate = x if z is None else z
    skip, bias, weight = (x if t is None else t.contiguous() for t in (D, delta_bias, delta_weight))
    with torch.cuda.device_of(x):
        _step[(triton.cdiv(channels, block), batch)](
            state, x, delta, weight, A.contiguous(), B, C, skip, gate, bias, y,
            channels, size, channels // B.shape[1], rank,
            *x.stride(), *delta.stride(), *gate.stride(), *B.stride(), *C.stride(),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            SOFTPLUS=softplus, RANK=triton.next_power_of_2(rank) if rank else 0,
            BLOCK=block, STATES=states, num_warps=4, **early(x),
        )  # fmt: skip
    return y


@triton.jit
def _step_head(
    state_ptr, x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr,
    heads, width, states, share, low, high, x_row, x_head, x_step, delta_row, delta_step,
    B_row, B_group, B_step, C_row, C_group, C_step,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
    LOG: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES).to(tl.int64)
    inside = p < width
    real = n < states
    both = inside[:, None] & real[None, :]
    at = ((row * heads + head) * width + p)[:, None] * states + n[None, :]
    rate = tl.load(A_ptr + head).to(tl.float32)
    if LOG:
        rate = -exp(rate)
    skip = 0.0
    if HAS_D:
        skip += tl.load(D_ptr + head).to(tl.float32)
    delta = 0.0
    if HAS_BIAS:
        delta += tl.load(bias_ptr + head).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    h = tl.load(state_ptr + at, mask=both, other=0.0)
    group = head // share
    B = tl.load(B_ptr + row * B_row + group * B_group + n * B_step, mask=real, other=0.0)
    C = tl.load(C_ptr + row * C_row + group * C_group + n * C_step, mask=real, other=0.0)
    x = tl.load(x_ptr + row * x_row + head * x_head + p * x_step, mask=inside, other=0.0)
    x = x.to(tl.float32)
    delta += tl.load(delta_ptr + row * delta_row + head * delta_step).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    if LIMITED:
        delta = tl.where(delta < low, low, delta)
        delta = tl.where(delta > high, high, delta)
    # A Δ below 0, which only a model without softplus can have, makes the state grow.
    decay = exp(delta * rate) if SOFTPLUS else tl.exp(delta * rate)
    h = tl.fma(h, decay, (delta * x)[:, None] * B.to(tl.float32)[None, :])
    tl.store(state_ptr + at, h, mask=both)
    y = tl.sum(h * C.to(tl.float32)[None, :], axis=1) + skip * x
    tl.store(y_ptr + (row * heads + head) * width + p, y.to(y_ptr.dtype.element_ty), mask=inside)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    delta_limit: tuple[float, float] = (0.0, math.inf),
    log_rates: bool = False,
) -> Tensor:
    """Mamba-2's step on a GPU; a state that is not dense float32 goes through the reference."""
    if not _writable(state):
        return reference.ssd_state_update(
            *(state, x, delta, A, B, C, D, delta_bias),
            delta_softplus=delta_softplus,
            delta_limit=delta_limit,
            log_rates=log_rates,
        )
    batch, heads, width, size = state.shape
    states = triton.next_power_of_2(size)
    block = max(_TILE // states, 1)
    y = torch.empty(batch, heads, width, dtype=x.dtype, device=x.device)
    skip, bias = (x if t is None else t.contiguous() for t in (D, delta_bias))
    with torch.cuda.device_of(x):
        _step_head[(triton.cdiv(width, block), heads, batch)](
            state, x, delta, A.contiguous(), B, C, skip, bias, y,
            heads, width, size, heads // B.shape[1], *delta_limit, *x.stride(), *delta.stride(),
            *B.stride(), *C.stride(),
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            LIMITED=delta_limit != (0.0, math.inf), LOG=log_rates, BLOCK=block, STATES=states,
            num_warps=4, **early(x),
        )  # fmt: skip
    return y


def _writable(state: Tensor) -> bool:
    """Whether the kernels can advance this state where it lies."""
    return state.dtype == torch.float32 and state.is_contiguous()
