"""Importance scores of tokens in Triton: Δ is read once, made and summed on the way."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops._triton import blocks, power_of_two, softplus
from widefield.plan import Pool, ScanInputs, SSDInputs

_NUMBERS = 2048  # that a program holds at a time
_WIDEST = 256


@triton.jit
def _score(
    delta_ptr, bias_ptr, clamp_ptr, weight_ptr, valid_ptr, score_ptr,
    tokens, length, channels, low, high,
    delta_batch, delta_token, valid_batch, valid_token,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr,
    WEIGHT: tl.constexpr, VALID: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = token // length
    place = token - batch * length
    inside = token < tokens
    start = batch * delta_batch + place * delta_token
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        here = d < channels
        mask = inside[:, None] & here[None, :]
        value = tl.load(delta_ptr + start[:, None] + d[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias_ptr + d, mask=here, other=0.0).to(tl.float32)[None, :]
        if SOFTPLUS:
            value = softplus(value)
        # Comparisons with NaN are false, so that NaN stays NaN.
        if LIMIT:
            value = tl.where(value < low, low, tl.where(value > high, high, value))
        if CLAMP:
            most = tl.load(clamp_ptr + d, mask=here, other=0.0).to(tl.float32)[None, :]
            value = tl.where(value > most, most, value)
        if WEIGHT:
            value *= tl.load(weight_ptr + d, mask=here, other=0.0).to(tl.float32)[None, :]
        total += tl.where(here[None, :], value * value, 0.0)
    score = tl.sqrt_rn(tl.sum(total, axis=1))
    if VALID:
        at = valid_ptr + batch * valid_batch + place * valid_token
        score = tl.where(tl.load(at, mask=inside, other=0) != 0, score, 0.0)
    tl.store(score_ptr + token, score, mask=inside)


def token_score(inputs: ScanInputs | SSDInputs, pool: Pool) -> Tensor:
    """‖w ⊙ min(Δ_t, c)‖₂ over channels, float32 (B, L); the same contract as the reference.

    Args:
        inputs: the scan's inputs; Δ may be float32, bfloat16 or float16.
        pool: its `clamp` c and `weight` w are used.
    """
    delta = inputs.delta if inputs.delta.stride(-1) == 1 else inputs.delta.contiguous()
    batch, length, channels = delta.shape
    limit = inputs.delta_limit if isinstance(inputs, SSDInputs) else (0.0, math.inf)
    score = torch.empty(batch, length, dtype=torch.float32, device=delta.device)
    if not score.numel():
        return score
    block = min(_WIDEST, power_of_two(channels))
    rows = _NUMBERS // block
    # Absent inputs are passed as Δ: their flag keeps the kernel from reading them.
    small = (inputs.delta_bias, pool.clamp, pool.weight)
    bias, clamp, weight = (delta if t is None else t.contiguous() for t in small)
    valid = delta if inputs.valid is None else inputs.valid
    with torch.cuda.device_of(delta):
        _score[(blocks(batch * length, rows),)](
            delta, bias, clamp, weight, valid, score,
            batch * length, length, channels, *limit, *delta.stride()[:2], *valid.stride()[:2],
            HAS_BIAS=inputs.delta_bias is not None, SOFTPLUS=inputs.delta_softplus,
            LIMIT=limit != (0.0, math.inf), CLAMP=pool.clamp is not None,
            WEIGHT=pool.weight is not None, VALID=inputs.valid is not None,
            ROWS=rows, BLOCK=block, BLOCKS=blocks(channels, block),
        )  # fmt: skip
    return score
