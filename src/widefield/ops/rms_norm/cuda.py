"""RMS norms in Triton: every value is read once and written once. Forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048  # that a program has in registers at least


@triton.jit
def _forward(
    x_ptr, gate_ptr, w_ptr, y_ptr, rows, length, groups, width, eps,
    x_batch, x_token, gate_batch, gate_token,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A row is one group of one token.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    token = row // groups
    within = (row - token * groups) * width
    batch = token // length
    place = token - batch * length
    start = (batch * x_batch + place * x_token + within)[:, None] + column[None, :]
    x = tl.load(x_ptr + start, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        start = (batch * gate_batch + place * gate_token + within)[:, None] + column[None, :]
        gate = tl.load(gate_ptr + start, mask=mask, other=0.0).to(tl.float32)
        gate = gate / (1.0 + tl.exp(-gate))
        if GATE_FIRST:
            x *= gate
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps)
    y = x * scale[:, None]
    if WEIGHT:
        weight = tl.load(w_ptr + within[:, None] + column[None, :], mask=mask, other=0.0)
        y *= weight.to(tl.float32)
    if GATE:
        if not GATE_FIRST:
            y *= gate
    out = row[:, None] * width + column[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, dtype: torch.dtype | None = None
) -> Tensor:
    """RMS norm: weight · x / √(mean(x²) + eps) on a GPU; the same contract as the reference."""
    return _launch(x, None, weight, eps, 1, False, dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    groups: int = 1,
    gate_first: bool = True,
) -> Tensor:
    """The gated norm on a GPU; the same contract as the reference."""
    return _launch(x, gate, weight, eps, groups, gate_first, None)


def _launch(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    groups: int,
    gate_first: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    if dtype is None:
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    rows, width = y.numel() // x.shape[-1] * groups, x.shape[-1] // groups
    x = _by_token(x)
    # Absent inputs are passed as x: their flag keeps the kernel from reading them.
    gate_ = x if gate is None else _by_token(gate)
    weight_ = x if weight is None else weight.contiguous()
    block = triton.next_power_of_2(width)
    many = max(1, _NUMBERS // block)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows, many),)](
            x, gate_, weight_, y, rows, x.shape[1], groups, width, eps,
            x.stride(0), x.stride(1), gate_.stride(0), gate_.stride(1),
            WEIGHT=weight is not None, GATE=gate is not None, GATE_FIRST=gate_first,
            ROWS=many, BLOCK=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return y


def _by_token(tensor: Tensor) -> Tensor:
    """(B, L, width) whose width is dense; a view where there is one."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    if tensor.ndim == 3:
        return tensor
    return tensor.reshape(1, -1, tensor.shape[-1])
