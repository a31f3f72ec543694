"""The y of Mamba-2's scan in CUDA C++, for Hopper's tensor cores: its variants and its launch."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from widefield.ops import _nvrtc

_SOURCE = Path(__file__).with_name("outputs.cu")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TILE = 64 * 128  # bytes


class _Parameters(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "B", "C", "z", "skip", "gain", "delta", "sums", "states", "y", "squares",
        )),
        *((f"{name}_{step}", ctypes.c_longlong) for name in ("x", "B", "C", "z")
          for step in ("row", "token", "head")),
        ("length", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("segment", "slots", "heads", "share")),
    )  # fmt: skip


def launch(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta: Tensor, sums: Tensor, states: Tensor,
    segment: int, y: Tensor, z: Tensor | None, gain: Tensor | None, squares: Tensor | None,
    columns: int,
) -> None:  # fmt: skip
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    split = width // 64
    kernel = _kernel(
        x.device.index, size, columns, split, None if D is None else _KINDS[D.dtype],
        None if gain is None else _KINDS[gain.dtype],
    )  # fmt: skip
    slots = -(-length // segment)
    pointers = (x, B, C, z, D, gain, delta, sums, states, y, squares)
    strides = (t.stride()[:3] if t is not None else (0, 0, 0) for t in (x, B, C, z))
    parameters = _Parameters(
        *(0 if t is None else t.data_ptr() for t in pointers),
        *(2 * s for three in strides for s in three),
        length, segment, slots, heads, heads // groups,
    )  # fmt: skip
    kernel.launch((heads * split // columns, slots, batch), parameters)


@functools.cache
def _kernel(
    device: int, states: int, columns: int, split: int, skip: int | None, gain: int | None
) -> _nvrtc.Kernel:
    halves, gated = states // 64, gain is not None
    stage = _TILE * (2 * halves + (1 + gated) * columns)
    macros = {
        "STATES": states, "COLUMNS": columns, "SPLIT": split,
        "HAS_SKIP": skip is not None, "SKIP_KIND": skip or 0,
        "HAS_GATE": gated, "GAIN_KIND": gain or 0,
    }  # fmt: skip
    shared = 2 * stage + (_TILE * halves + 4 * 4 * 64) * columns
    return _nvrtc.build(
        _SOURCE, "ssd_outputs", macros, threads=128 * columns, shared=shared, only_here=True
    )
