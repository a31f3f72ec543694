"""What the scans in CUDA C++ have in common on the host: what they read and can read, and calls.

The struct of the one for few rows begins with pointers: those of `Given`, of y, of the final states
and of the signals by which its blocks tell each other. So its launches can be kept for the next
call.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops._backend import on_device_of
from widefield.plan import LayerPlan, ScanInputs

__all__ = [
    "POINTERS", "Given", "Launch", "again", "aligned", "as_floats", "dense", "keep", "kind_macros",
    "kinds_of", "read", "readable", "readable_on_this_gpu", "rows_of", "run", "scan", "size",
    "step_of",
]  # fmt: skip

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROWS = 1 << 16  # of a grid
_READ = ("X", "DELTA", "B", "C", "Z", "SKIP", "BIAS")
POINTERS = (
    "x", "delta", "B", "C", "z", "skip", "bias", "A", "floor", "scale", "decay", "initial", "valid",
    "ends", "y", "final", "arrived",
)  # fmt: skip
_PACKED = struct.Struct(f"{len(POINTERS)}Q")
_MOST = 4096

Given = tuple[Any, ...]  # tensors or None, in the order of POINTERS, without the last three


class Launch(NamedTuple):
    """A kernel with all that it is told but for its pointers.

    Attributes:
        kernel: what runs.
        grid: how many blocks.
        rest: the bytes of its struct behind the pointers.
        signals: how many numbers blocks tell each other by.
    """

    kernel: _nvrtc.Kernel
    grid: tuple[int, int, int]
    rest: bytes
    signals: int


_signals: dict[tuple[int, int], Tensor] = {}  # by device and stream
# By likeness.
_launches: dict[tuple[Any, ...], Launch] = {}


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


def readable(given: Given) -> Given:
    """The same, copied where a kernel could not read it as it is."""
    large, small, floats, (valid, ends) = given[:5], given[5:7], given[7:12], given[12:]
    return (
        *(dense(t) for t in large),
        *(None if t is None else t.contiguous() for t in small),
        *(as_floats(t) for t in floats),
        valid,
        None if ends is None else ends.contiguous(),
    )


def scan(
    inputs: ScanInputs, plan: LayerPlan, launch_of: Callable[[Given], Launch], keep_it: bool
) -> tuple[Tensor, Tensor]:
    """Run a scan by what `launch_of` says of tensors that a kernel can read.

    Args:
        inputs: what the scan reads.
        plan: what a method asks of this layer.
        launch_of: from the tensors to what to launch.
        keep_it: whether `again` may take the launch over.

    Returns:
        y and the final states.
    """
    given = read(inputs, plan)
    with on_device_of(inputs.x), torch.no_grad():
        tensors = readable(given)
        launch = launch_of(tensors)
        done = run(launch, tensors)
    if keep_it:
        keep(given, tensors, inputs.delta_softplus, launch)
    return done


def run(launch: Launch, tensors: Given) -> tuple[Tensor, Tensor]:
    """Launch a kernel for tensors that it can read; gives y and the final states."""
    x, A = tensors[0], tensors[7]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = rows_of(x, tensors[13])
    final = torch.empty((rows, *A.shape), dtype=torch.float32, device=x.device)
    signals = _signals_of(launch.signals, x.device) if launch.signals else None
    told = _PACKED.pack(*_places((*tensors, y, final, signals))) + launch.rest
    launch.kernel.launch(launch.grid, ctypes.create_string_buffer(told, len(told)))
    return y, final


def _signals_of(count: int, device: torch.device) -> Tensor:
    """Zeros, in int32, that the kernel leaves as zeros.

    Calls of one stream come one after the other and share them; those of a recorded graph, which
    may run on any, have their own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device.index, _nvrtc.current_stream()
    if key not in _signals or len(_signals[key]) < count:
        _signals[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _signals[key]


def keep(given: Given, tensors: Given, softplus: bool, launch: Launch) -> None:
    """Keep a launch for calls that differ in nothing but the tensors' contents.

    Args:
        given: the call's own tensors.
        tensors: what was made of them for the kernel; nothing is kept where that are others.
        softplus: whether Δ is made by a softplus.
        launch: what was launched.
    """
    if any(a is not b for a, b in zip(tensors, given, strict=True)):
        return
    if len(_launches) >= _MOST:  # every length of a prompt is one
        _launches.clear()
    _launches[_likeness(given, _places(given), softplus)] = launch


def again(inputs: ScanInputs, plan: LayerPlan) -> tuple[Tensor, Tensor] | None:
    """A scan that differs from one whose launch was kept in nothing but the tensors' contents.

    Which variant runs, and most of what it is told, need not be found out again then.

    Returns:
        y and the final states; None if there was no such scan.
    """
    tensors = read(inputs, plan)
    launch = _launches.get(_likeness(tensors, _places(tensors), inputs.delta_softplus))
    if launch is None:
        return None
    with on_device_of(inputs.x):
        return run(launch, tensors)


def aligned(tensor: Tensor, size: int) -> bool:
    """Whether so many bytes can be read at once wherever a multiple of them begins in a token."""
    numbers = size // tensor.element_size()
    return not (
        tensor.data_ptr() % size
        or (tensor.shape[1] > 1 and tensor.stride(1) % numbers)
        or (tensor.shape[0] > 1 and tensor.stride(0) % numbers)
    )


def _places(tensors: Given) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _likeness(tensors: Given, places: list[int], softplus: bool) -> tuple[Any, ...]:
    x, ends = tensors[0], tensors[-1]
    kinds = [None if t is None else (t.dtype, t.stride()) for t in tensors]
    shape = None if ends is None else ends.shape
    return (softplus, x.get_device(), x.shape, shape, *kinds, *(place & 15 for place in places))


def step_of(tensor: Tensor | None) -> int:
    """From token to token; one token's step may be any number, and is left out of the cache."""
    return 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)


def as_floats(tensor: Tensor | None) -> Any:
    """Dense, in float32."""
    return None if tensor is None else tensor.float().contiguous()


def dense(tensor: Tensor | None) -> Any:
    """With channels or states side by side."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()
