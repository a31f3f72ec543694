"""Importance scores of tokens on the CPU: Δ is made and summed on the way, never stored."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from widefield.ops._numba import (
    BYTES,
    WIDTH,
    in_parallel,
    kernel,
    load_flag,
    load_some,
    softplus,
    store_number,
    sum_of_squares,
    where,
)
from widefield.plan import Pool, ScanInputs

CHUNK = 256  # tokens of one task


@kernel
def _score(
    scores, delta, delta_stride, bias, clamp, weight, valid, tokens, channels, apply_softplus
):
    """‖w ⊙ min(Δ, c)‖ of each token, summed in float64. Address 0 of valid stands for None."""
    for t in range(tokens):
        total = 0.0
        if valid == 0 or load_flag(valid + t):
            for block in range(0, channels, WIDTH):
                count, here = channels - block, block * BYTES
                value = load_some(delta + (t * delta_stride + block) * BYTES, count)
                value = value + load_some(bias + here, count)
                if apply_softplus:
                    value = softplus(value)
                most = load_some(clamp + here, count)
                value = where(most < value, most, value) * load_some(weight + here, count)
                total += sum_of_squares(value)
        store_number(scores + t * BYTES, math.sqrt(total))


def token_score(inputs: ScanInputs, pool: Pool) -> Float[Tensor, "batch length"]:
    """‖w ⊙ min(Δ_t, c)‖₂ over channels, float32; with the signature of the reference.

    Args:
        inputs: the scan's inputs; Δ may be float32, bfloat16 or float16.
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

        def run(task: tuple[int, int]) -> None:
            row, start = task
            wide = delta[row, start : start + CHUNK].float()
            offset = row * length + start
            _score(
                scores.data_ptr() + offset * BYTES,
                wide.data_ptr(),
                wide.stride(0),
                bias.data_ptr(),
                clamp.data_ptr(),
                weight.data_ptr(),
                0 if valid is None else valid.data_ptr() + offset,
                len(wide),
                channels,
                inputs.delta_softplus,
            )

        in_parallel(run, [(row, t) for row in range(batch) for t in range(0, length, CHUNK)])
    return scores


def _constants(values: Tensor | None, default: float, channels: int) -> Float[Tensor, " channels"]:
    return torch.full((channels,), default) if values is None else values.float().contiguous()
