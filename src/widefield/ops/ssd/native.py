"""Mamba-2's scan in CUDA C++, for Hopper's tensor cores: variants and launches of its kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops._backend import wants_cuda_cpp
from widefield.plan import SSDInputs

__all__ = ["BLOCKS", "Gate", "outputs", "segment_of", "states", "supports"]

_FOLDER = Path(__file__).parent
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIDTH = 64  # channels of a block
_CHUNK = 64  # tokens
_TILE = _CHUNK * 128  # bytes
_MOST_SEGMENTS = 64
BLOCKS = 2  # of the kernel of y that run on a multiprocessor at the same time


@dataclass(frozen=True, slots=True)
class Gate:
    """What y passes through.

    Attributes:
        z: (B, L, H, P) of the dtype of x; y is multiplied by its silu.
        gain: (H · P,) multiplies that, behind the sums of squares.
    """

    z: Tensor
    gain: Tensor


def _fields(pointers: str, strided: str) -> list[tuple[str, Any]]:
    """Of a kernel's struct `Parameters`."""
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((f"{name}_{step}", ctypes.c_longlong) for name in strided.split()
          for step in ("row", "head")),
        ("length", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("segment", "slots", "heads", "share")),
    ]  # fmt: skip


class _Outputs(ctypes.Structure):
    _fields_ = _fields("x B C z skip gain delta sums added kept initial y squares final", "x B C z")


class _States(ctypes.Structure):
    _fields_ = _fields("x B delta sums rests added kept", "x B")


def supports(inputs: SSDInputs, gate: Gate | None = None) -> bool:
    """Whether these kernels can run the scan."""
    x, B, C = inputs.x, inputs.B, inputs.C
    if inputs.valid is not None or inputs.cu_seqlens is not None or not x.is_cuda:
        return False
    large = [x, B, C] if gate is None else [x, B, C, gate.z]
    return (
        x.numel() > 0
        and x.shape[3] % _WIDTH == 0
        and B.shape[3] in (64, 128)
        and x.shape[0] < 1 << 16
        and all(t.dtype == torch.bfloat16 and _is_aligned(t) for t in large)
        and (inputs.D is None or inputs.D.dtype in _KINDS)
        and (gate is None or (gate.gain.dtype in _KINDS and gate.gain.data_ptr() % 8 == 0))
        and wants_cuda_cpp()
        and _has_tensor_cores(x.device.index)
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether 8 numbers can be read at once wherever they begin."""
    *outer, last = tensor.stride()
    return last == 1 and all(s % 8 == 0 for s in outer) and tensor.data_ptr() % 16 == 0


@functools.cache
def _has_tensor_cores(device: int) -> bool:
    """Whether its tensor cores are Hopper's."""
    return torch.cuda.get_device_capability(device) == (9, 0) and _nvrtc.available(device)


@functools.lru_cache(maxsize=256)
def segment_of(processors: int, blocks: int, length: int) -> int:
    """Tokens of a segment, so that the blocks of all segments fill the processors evenly.

    Args:
        processors: blocks that run at the same time.
        blocks: of a segment.
        length: tokens of a row.
    """
    chunks = -(-length // _CHUNK)

    def cost(slots: int) -> float:
        # What a segment takes beyond its chunks, here and in the pass before, is that of so many.
        return -(-blocks * slots // processors) * (-(-chunks // slots) + 2)

    slots = min(range(1, min(_MOST_SEGMENTS, chunks) + 1), key=cost)
    return _CHUNK * -(-chunks // slots)


def states(
    inputs: SSDInputs, made: Sequence[Tensor], segment: int, slots: int
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, and what it leaves of the state before.

    Args:
        inputs: what the scan reads.
        made: Δ and the sums of logarithms of decays since each chunk's start, with what rounding
            left of these, (B, H, L), float32.
        segment: tokens of a segment.
        slots: segments of a row.

    Returns:
        (B, segments, H, P, N) and (B, segments, H), float32.
    """
    x, B = inputs.x, inputs.B
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    split = width // _WIDTH
    empty = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    added, kept = empty(batch, slots, heads, width, size), empty(batch, slots, heads)
    kernel = _states_kernel(x.device.index, size, split, *_tokens(x, B))
    strides = _outer(x, B)
    pointers = (t.data_ptr() for t in (x, B, *made, added, kept))
    sizes = (length, segment, slots, heads, heads // groups)
    kernel.launch((heads * split, slots, batch), _States(*pointers, *strides, *sizes))
    return added, kept


def outputs(
    inputs: SSDInputs,
    made: Sequence[Tensor],
    passed: Sequence[Tensor],
    segment: int,
    gate: Gate | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What comes out of the scan.

    Args:
        inputs: what the scan reads.
        made: as in `states`.
        passed: what `states` returns.
        segment: tokens of a segment.
        gate: what y passes through, or None.

    Returns:
        y, the final state, and with a gate the sums of squares (B, L, parts).
    """
    x, B, C = inputs.x, inputs.B, inputs.C
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    split = width // _WIDTH
    skip, initial = _plain(inputs.D), _plain(inputs.initial_state, torch.float32)
    z, gain = (None, None) if gate is None else (gate.z, _plain(gate.gain))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = empty(batch, heads, width, size)
    squares = None if gate is None else empty(batch, length, heads * split)
    kinds = (_kind(skip), _kind(gain))
    strided = (x, B, C, z)
    kernel = _outputs_kernel(
        x.device.index, size, split, *kinds, initial is not None, _tokens(*strided)
    )
    slots = passed[1].shape[1]
    tensors = (x, B, C, z, skip, gain, *made[:2], *passed, initial, y, squares, final)
    pointers = (0 if t is None else t.data_ptr() for t in tensors)
    strides = _outer(*strided)
    sizes = (length, segment, slots, heads, heads // groups)
    kernel.launch((heads * split, slots, batch), _Outputs(*pointers, *strides, *sizes))
    return y, final, squares


def _plain(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _kind(tensor: Tensor | None) -> int | None:
    return None if tensor is None else _KINDS[tensor.dtype]


def _outer(*tensors: Tensor | None) -> list[int]:
    """Bytes from row to row and from head to head."""
    return [0 if t is None else 2 * t.stride(axis) for t in tensors for axis in (0, 2)]


def _tokens(*tensors: Tensor | None) -> tuple[int, ...]:
    """Bytes from token to token."""
    return tuple(0 if t is None else 2 * t.stride(1) for t in tensors)


@functools.lru_cache(maxsize=256)
def _states_kernel(
    device: int | None, states: int, split: int, x_token: int, B_token: int
) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    shared = 2 * (_TILE * (states // 64 + 1) + 4 * _CHUNK)
    macros = {"STATES": states, "SPLIT": split, "X_TOKEN": x_token, "B_TOKEN": B_token}
    source = _FOLDER / "states.cu"
    return _nvrtc.build(source, "ssd_states", macros, threads=128, shared=shared, only_here=True)


@functools.lru_cache(maxsize=256)
def _outputs_kernel(
    device: int | None,
    states: int,
    split: int,
    skip: int | None,
    gain: int | None,
    initial: bool,
    tokens: tuple[int, ...],
) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    halves, gated = states // 64, gain is not None
    stage = _TILE * (2 * halves + 1 + gated)
    macros = {
        "STATES": states, "SPLIT": split,
        "HAS_SKIP": skip is not None, "SKIP_KIND": skip or 0, "HAS_INITIAL": initial,
        "HAS_GATE": gated, "GAIN_KIND": gain or 0,
        **dict(zip(("X_TOKEN", "B_TOKEN", "C_TOKEN", "Z_TOKEN"), tokens, strict=True)),
    }  # fmt: skip
    shared = 2 * stage + _TILE * halves + 4 * 4 * _CHUNK
    source = _FOLDER / "outputs.cu"
    return _nvrtc.build(source, "ssd_outputs", macros, threads=128, shared=shared, only_here=True)
