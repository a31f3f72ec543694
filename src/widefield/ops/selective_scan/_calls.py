"""What the scans in CUDA C++ have in common on the host: what they read and can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.plan import LayerPlan, ScanInputs

__all__ = [
    "Given", "aligned", "flags_of", "kind_macros", "kinds_of", "read", "readable",
    "readable_on_this_gpu", "rows_of", "size",
]  # fmt: skip

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROWS = 1 << 16  # of a grid
_READ = ("X", "DELTA", "B", "C", "Z", "SKIP", "BIAS")

Given = tuple[Any, ...]  # tensors or None, in the order of `read`


def read(inputs: ScanInputs, plan: LayerPlan) -> Given:
    """What a kernel reads."""
    return (
        inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z, inputs.D, inputs.delta_bias, inputs.A,
        plan.delta_floor, plan.delta_scale, plan.decay_scale, inputs.initial_state, inputs.valid,
        inputs.cu_seqlens,
    )  # fmt: skip


def readable_on_this_gpu(inputs: ScanInputs) -> bool:
    """Whether a kernel can be compiled here that reads tensors of these dtypes, so many rows."""
    x = inputs.x
    if not (x.is_cuda and x.numel() and rows_of(x, inputs.cu_seqlens) < _ROWS):
        return False
    read_ones = (x, inputs.delta, inputs.B, inputs.C, inputs.z, inputs.D, inputs.delta_bias)
    return (
        all(t is None or t.dtype in _KINDS for t in read_ones)
        and inputs.A.dtype == torch.float32
        and _nvrtc.available(x.device.index)
    )


def rows_of(x: Tensor, ends: Tensor | None) -> int:
    """How many sequences are scanned side by side."""
    return x.shape[0] if ends is None else len(ends) - 1


def size(tensors: Given) -> tuple[int, int, int]:
    """How many rows, or sequences side by side, channels and states there are."""
    return rows_of(tensors[0], tensors[13]), *tensors[7].shape


def kinds_of(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Kinds of numbers, as numbers.cuh counts them."""
    return tuple(0 if t is None else _KINDS[t.dtype] for t in tensors)


def kind_macros(kinds: Sequence[int]) -> dict[str, int]:
    """Of x, Δ, B, C, z, skip and bias."""
    return {f"{name}_KIND": kind for name, kind in zip(_READ, kinds, strict=True)}


def flags_of(tensors: Given, softplus: bool) -> tuple[tuple[str, int], ...]:
    """What there is, and how far it is from token to token, as macros."""
    x, delta, B, C, z, skip, bias, _, floor, scale, decay, initial, valid, _ = tensors
    present = {
        "HAS_SKIP": skip, "HAS_Z": z, "HAS_BIAS": bias, "FLOOR": floor, "SCALE": scale,
        "DECAY": decay, "VALID": valid, "INITIAL": initial,
    }  # fmt: skip
    tokens = {"X": x, "DELTA": delta, "B": B, "C": C, "Z": z}
    return (
        *((name, int(t is not None)) for name, t in present.items()),
        ("SOFTPLUS", int(softplus)),
        ("EXACT", int(x.dtype == torch.float32)),
        ("CHANNELS", x.shape[2]),
        *((f"{name}_TOKEN", _step_of(t)) for name, t in tokens.items()),
    )


def readable(given: Given) -> Given:
    """The same, copied where a kernel could not read it as it is."""
    large, small, floats, (valid, ends) = given[:5], given[5:7], given[7:12], given[12:]
    return (
        *(_dense(t) for t in large),
        *(None if t is None else t.contiguous() for t in small),
        *(_as_floats(t) for t in floats),
        valid,
        None if ends is None else ends.contiguous(),
    )


def aligned(tensor: Tensor, size: int) -> bool:
    """Whether so many bytes can be read at once wherever a multiple of them begins in a token."""
    numbers = size // tensor.element_size()
    return not (
        tensor.data_ptr() % size
        or (tensor.shape[1] > 1 and tensor.stride(1) % numbers)
        or (tensor.shape[0] > 1 and tensor.stride(0) % numbers)
    )


def _step_of(tensor: Tensor | None) -> int:
    """From token to token; one token's step may be any number, and is left out of the cache."""
    return 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)


def _as_floats(tensor: Tensor | None) -> Any:
    """Dense, in float32."""
    return None if tensor is None else tensor.float().contiguous()


def _dense(tensor: Tensor | None) -> Any:
    """With channels or states side by side."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()
