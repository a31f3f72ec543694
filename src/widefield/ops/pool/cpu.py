"""Importance scores of tokens on the CPU: Δ is made and summed on the way, never stored."""

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
    inlined,
    load_flag,
    load_some,
    next_task,
    softplus,
    store_number,
    sum_of_squares,
    where,
)
from widefield.plan import Pool, ScanInputs, SSDInputs

CHUNK = 128  # tokens of one task
SEGMENT = 1024  # tokens that are widened at once where Δ is not float32


@inlined
def _chunk(
    task, chunks, length, channels, apply_softplus,
    scores, scores_row, delta, delta_row, delta_stride, bias, clamp, weight, valid, valid_row,
):  # fmt: skip
    """‖w ⊙ min(Δ, c)‖ of some tokens of a row, summed in float64. Address 0 of valid: None."""
    row, start = task // chunks, task % chunks * CHUNK
    for t in range(start, min(start + CHUNK, length)):
        total = 0.0
        if valid == 0 or load_flag(valid + row * valid_row + t):
            for block in range(0, channels, WIDTH):
                count, here = channels - block, block * BYTES
                value = load_some(
                    delta + (row * delta_row + t * delta_stride) * BYTES + here, count
                )
                value = value + load_some(bias + here, count)
                if apply_softplus != 0:
                    value = softplus(value)
                most = load_some(clamp + here, count)
                value = where(most < value, most, value) * load_some(weight + here, count)
                total += sum_of_squares(value)
        store_number(scores + (row * scores_row + t) * BYTES, math.sqrt(total))


@Kernel
def _score(call):
    while True:
        task = next_task(call)
        if task < 0:
            return
        _chunk(task, *arguments(call, 14))


def token_score(inputs: ScanInputs | SSDInputs, pool: Pool) -> Float[Tensor, "batch length"]:
    """‖w ⊙ min(Δ_t, c)‖₂ over channels, float32; with the signature of the reference.

    Args:
        inputs: the scan's inputs; Δ may be float32, bfloat16 or float16, and has no limits.
        pool: its `clamp` c and `weight` w are used.

    Returns:
        The score of each token; 0 for padding.
    """
    with torch.no_grad():
        delta = inputs.delta if inputs.delta.stride(-1) == 1 else inputs.delta.contiguous()
        batch, length, channels = delta.shape
        bias = _constants(inputs.delta_bias, 0.0, channels)
        clamp = _constants(pool.clamp, math.inf, channels)
        weight = _constants(pool.weight, 1.0, channels)
        valid = None if inputs.valid is None else inputs.valid.contiguous()
        scores = torch.empty(batch, length)
        step = length if delta.dtype == torch.float32 else SEGMENT
        for start in range(0, length, step):
            wide = delta[:, start : start + step].float()
            chunks = -(-wide.shape[1] // CHUNK)
            _score(
                batch * chunks,
                *(chunks, wide.shape[1], channels, inputs.delta_softplus),
                *(scores.data_ptr() + start * BYTES, length),
                *(wide.data_ptr(), *wide.stride()[:2]),
                *(bias.data_ptr(), clamp.data_ptr(), weight.data_ptr()),
                *((0, 0) if valid is None else (valid.data_ptr() + start, length)),
            )
    return scores


def _constants(values: Tensor | None, default: float, channels: int) -> Float[Tensor, " channels"]:
    return torch.full((channels,), default) if values is None else values.float().contiguous()
