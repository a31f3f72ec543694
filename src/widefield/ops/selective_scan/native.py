"""The forward of the selective scan in CUDA C++: which variant runs, and its launch."""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops._backend import on_device_of
from widefield.plan import LayerPlan, ScanInputs

__all__ = ["Layout", "selective_scan", "selective_scan_again", "supports"]

_SOURCE = Path(__file__).with_name("forward.cu")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATES = (8, 16, 32)
_TILE = 32  # tokens
_FAR = 1 << 22  # elements from token to token: lanes count bytes within a tile in 32 bits


@dataclass(frozen=True)
class Layout:
    """How the warps of a block share its channels.

    A warp's scheduler is its number mod 4. Consumers have one to themselves, or nearly so, or are
    several that take turns.

    Attributes:
        group: lanes that share a channel.
        consumers: warps 0 to consumers - 1; each has 32 / group channels, and so has each of the
            following ones, which take turns with them.
        producers: which warps are producers, as bits.
        finishers: which warps are finishers, as bits.
        slots: tiles that are in shared memory at once.
        stages: how often lanes exchange sums before finishers add up the rest; 0, 1 or 3.
        tensor: the sums are made on tensor cores: for x, B and C in bfloat16, with 16 states.
        turns: how many warps take turns along the tokens of the same channels: 1, or, if the sums
            are made on tensor cores, an even number; at most 15 take turns in a block.
    """

    group: int
    consumers: int
    producers: int
    finishers: int
    slots: int = 4
    stages: int = 0
    tensor: bool = False
    turns: int = 1

    @property
    def warps(self) -> int:
        """Of a block; some may have nothing to do."""
        return (self.producers | self.finishers).bit_length()

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.consumers * 32 // self.group

    def shared_bytes(self, states: int) -> int:
        """The size of the buffers, as the kernel computes it."""
        padding = (self.channels - 1) // 8 * 8
        steps = 2 * (self.channels * (_TILE + 4) + padding)
        if self.tensor and self.turns == 1:
            steps = self.channels * (2 * _TILE + 4) + padding
        if self.tensor:
            pitch = self.channels + (4 if self.channels % 8 == 0 else 0)
            projections = 2 * _TILE * 8
            sums = 2 * (_TILE * pitch + 4) + 16 * self.channels
        else:
            projections = 2 * _TILE * (states // self.group) // 4 * (4 * self.group + 4)
            part = _TILE * self.channels + {0: 4, 1: 8, 3: 0}[self.stages]
            sums = part * (1 if self.stages == 3 else self.group >> self.stages)
        handed = 64 * self.consumers * self.turns if self.turns > 1 else 0
        buffers = self.slots * (4 * (steps + projections + sums) + 24)
        return buffers + 4 * handed + 8 * self.channels


# By the quads of channels of a block; chosen by measurement, see benchmarks/LOG.md.
_LAYOUTS = {
    1: Layout(group=8, consumers=1, producers=0xCC, finishers=0x22),
    2: Layout(group=8, consumers=2, producers=0xCC, finishers=0xC00, slots=8, stages=3),
    3: Layout(group=8, consumers=3, producers=0x8888, finishers=0x70, slots=8, stages=3),
}
# The four channels over more lanes: what counts there is how long a token takes.
_SPREAD = Layout(group=16, consumers=2, producers=0xCC, finishers=0x330, stages=1)
# On tensor cores, where that is faster.
_TENSOR = {
    1: Layout(
        group=8, consumers=1, producers=0xFF00, finishers=0xF0000, slots=8, tensor=True, turns=8
    ),
    2: Layout(
        group=8, consumers=2, producers=0xF000, finishers=0xF0000, slots=8, tensor=True, turns=6
    ),
    3: Layout(group=8, consumers=3, producers=0x8888, finishers=0x8880000, slots=8, tensor=True),
    4: Layout(group=8, consumers=4, producers=0xF0, finishers=0xF00, slots=8, tensor=True),
}


class _Parameters(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "delta", "B", "C", "z", "skip", "bias",
            "A", "floor", "scale", "decay", "initial", "valid", "ends", "y", "final",
        )),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        *((f"{name}_token", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        ("length", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("channels", "floor_row", "scale_row", "decay_row")),
    )  # fmt: skip


_PACKED = struct.Struct(f"{[field[1] for field in _Parameters._fields_].count(ctypes.c_void_p)}Q")
Launch = tuple[_nvrtc.Kernel, tuple[int, int, int], bytes]
# By likeness, what was launched, and its struct behind the pointers.
_launches: dict[tuple[Any, ...], Launch] = {}
_MOST = 4096


def supports(inputs: ScanInputs) -> bool:
    """Whether this forward can run the scan; gradients are not its business."""
    x = inputs.x
    rows = x.shape[0] if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    if not (x.is_cuda and x.numel() and inputs.A.shape[1] in _STATES and rows < 1 << 16):
        return False
    large = [t for t in (x, inputs.delta, inputs.B, inputs.C, inputs.z) if t is not None]
    small = [t for t in (inputs.D, inputs.delta_bias) if t is not None]
    return (
        all(t.dtype in _KINDS for t in large + small)
        and all(t.stride(1) < _FAR for t in large)
        and inputs.A.dtype == torch.float32
        and _capable(x.device.index)
        and _nvrtc.available(x.device.index)
    )


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan, layout: Layout | None = None, *, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Run a scan that is supported; the same contract as the reference, without gradients.

    Args:
        inputs: what the scan reads.
        plan: what a method asks of this layer.
        layout: to run with another one than the chosen.
        keep: whether `selective_scan_again` may take its launch over.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    with on_device_of(inputs.x), torch.no_grad():
        call = _Call(inputs, plan)
        y, final, launch = call.run(layout)
    given = _read(inputs, plan)
    if keep and all(a is b for a, b in zip(call.read(), given, strict=True)):
        if len(_launches) >= _MOST:  # every length of a prompt is one
            _launches.clear()
        pointers = [0 if t is None else t.data_ptr() for t in given]
        _launches[_likeness(given, pointers, inputs.delta_softplus)] = launch
    return y, final


def selective_scan_again(inputs: ScanInputs, plan: LayerPlan) -> tuple[Tensor, Tensor] | None:
    """The same for a scan that differs from an earlier one in nothing but the tensors' contents.

    Which variant runs, and most of what it is told, need not be found out again then.

    Returns:
        As `selective_scan`; None if there was no such scan.
    """
    tensors = _read(inputs, plan)
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    launch = _launches.get(_likeness(tensors, pointers, inputs.delta_softplus))
    if launch is None:
        return None
    kernel, grid, rest = launch
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    final = inputs.A.new_empty((grid[1], *inputs.A.shape))
    packed = _PACKED.pack(*pointers, y.data_ptr(), final.data_ptr())
    with on_device_of(y):
        kernel.launch(grid, _Parameters.from_buffer_copy(packed + rest))
    return y, final


def _read(inputs: ScanInputs, plan: LayerPlan) -> tuple[Tensor | None, ...]:
    """What the kernel reads, in the order of its struct."""
    return (
        inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z, inputs.D, inputs.delta_bias, inputs.A,
        plan.delta_floor, plan.delta_scale, plan.decay_scale, inputs.initial_state, inputs.valid,
        inputs.cu_seqlens,
    )  # fmt: skip


def _likeness(
    tensors: tuple[Tensor | None, ...], pointers: list[int], softplus: bool
) -> tuple[Any, ...]:
    """What two calls have in common that differ in nothing but the tensors' contents."""
    x, ends = tensors[0], tensors[-1]
    assert x is not None
    kinds = [None if t is None else (t.dtype, t.stride()) for t in tensors]
    places = [pointer & 15 for pointer in pointers]
    shape = None if ends is None else ends.shape
    return (softplus, x.get_device(), x.shape, shape, *kinds, *places)


class _Call:
    """The tensors of one call, as the kernel reads them."""

    def __init__(self, inputs: ScanInputs, plan: LayerPlan) -> None:
        self.x, self.delta, self.z = _dense(inputs.x), _dense(inputs.delta), _dense(inputs.z)
        self.B, self.C = _dense(inputs.B), _dense(inputs.C)
        self.skip, self.bias = _contiguous(inputs.D), _contiguous(inputs.delta_bias)
        self.A, self.initial = _floats(inputs.A), _floats(inputs.initial_state)
        self.floor, self.scale = _floats(plan.delta_floor), _floats(plan.delta_scale)
        self.decay = _floats(plan.decay_scale)
        self.valid, self.ends = inputs.valid, _contiguous(inputs.cu_seqlens)
        self.softplus = inputs.delta_softplus

    def read(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of the kernel's struct."""
        return (
            self.x, self.delta, self.B, self.C, self.z, self.skip, self.bias, self.A, self.floor,
            self.scale, self.decay, self.initial, self.valid, self.ends,
        )  # fmt: skip

    def run(self, layout: Layout | None) -> tuple[Tensor, Tensor, Launch]:
        x = self.x
        rows, _, channels = x.shape
        if self.ends is not None:
            rows = len(self.ends) - 1
        states = self.A.shape[1]
        if layout is None:
            table = self.layouts(states)
            layout = _layout(x.device.index, rows, channels, states, table)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.empty(rows, channels, states, dtype=torch.float32, device=x.device)
        kernel = _kernel(
            x.device.index, layout, states, self.kinds(), self.flags(), self.ends_kind()
        )
        grid = (-(-channels // layout.channels), rows, 1)
        parameters = self.parameters(y, final)
        kernel.launch(grid, parameters)
        return y, final, (kernel, grid, bytes(parameters)[_PACKED.size :])

    def layouts(self, states: int) -> str:
        """Which layouts there are: on tensor cores, where sums rounded to bfloat16 are enough."""
        brief = all(t.dtype == torch.bfloat16 for t in (self.x, self.B, self.C))
        return "brief" if brief and states == 16 else "exact"

    def kinds(self) -> tuple[int, ...]:
        read = (self.x, self.delta, self.B, self.C, self.z, self.skip, self.bias)
        return tuple(0 if t is None else _KINDS[t.dtype] for t in read)

    def flags(self) -> tuple[bool, ...]:
        large = (self.x, self.delta, self.z)
        wide = self.x.shape[2] % 4 == 0 and all(t is None or _aligned(t, 4) for t in large)
        return (
            self.skip is not None,
            self.z is not None,
            self.bias is not None,
            self.softplus,
            self.floor is not None,
            self.scale is not None,
            self.decay is not None,
            self.valid is not None,
            self.initial is not None,
            wide,
            all(_aligned(t, 16 // t.element_size()) for t in (self.B, self.C)),
            self.x.dtype == torch.float32,
        )

    def ends_kind(self) -> int:
        return 0 if self.ends is None else self.ends.element_size() // 4

    def parameters(self, y: Tensor, final: Tensor) -> _Parameters:
        strided = (self.x, self.delta, self.B, self.C, self.z, self.valid)
        pointers = (*self.read(), y, final)
        return _Parameters(
            *(0 if t is None else t.data_ptr() for t in pointers),
            *(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in strided),
            *(0 if t is None else t.stride(1) for t in strided),
            self.x.shape[1],
            self.x.shape[2],
            *(0 if t is None or t.ndim == 1 else t.shape[1] for t in pointers[8:11]),
        )


@functools.lru_cache(maxsize=256)
def _layout(device: int, rows: int, channels: int, states: int, layouts: str) -> Layout:
    """As many channels a block as let every multiprocessor have a block."""
    chip = torch.cuda.get_device_properties(device)
    table = _LAYOUTS | {"exact": {}, "brief": _TENSOR}[layouts]
    quads = rows * -(-channels // 4)
    quads = min(max(table), -(-quads // chip.multi_processor_count))
    layout = table[quads]
    if layout == _LAYOUTS[1] and states >= _SPREAD.group:
        layout = _SPREAD
    if layout.shared_bytes(states) > chip.shared_memory_per_block_optin:
        layout = replace(layout, slots=4)
    return layout


@functools.cache
def _capable(device: int) -> bool:
    """Whether it has mbarriers and bfloat16, which came with compute capability 8.0."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _kernel(
    device: int,
    layout: Layout,
    states: int,
    kinds: tuple[int, ...],
    flags: tuple[bool, ...],
    ends: int,
) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    shared = layout.shared_bytes(states)
    names = ("X", "DELTA", "B", "C", "Z", "SKIP", "BIAS")
    switches = (
        "HAS_SKIP", "HAS_Z", "HAS_BIAS", "SOFTPLUS", "FLOOR", "SCALE", "DECAY", "VALID", "INITIAL",
        "WIDE", "WIDE_BC", "EXACT",
    )  # fmt: skip
    macros = {
        **{f"{name}_KIND": kind for name, kind in zip(names, kinds, strict=True)},
        **dict(zip(switches, flags, strict=True)),
        **{name.upper(): value for name, value in asdict(layout).items()},
        "ENDS": ends,
        "STATES": states,
        "WARPS": layout.warps,
        "SHARED": shared,
    }
    return _nvrtc.build(
        _SOURCE, "selective_scan_forward", macros, threads=32 * layout.warps, shared=shared
    )


def _dense(tensor: Tensor | None) -> Any:
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _floats(tensor: Tensor | None) -> Any:
    return tensor if tensor is None else tensor.float().contiguous()


def _aligned(tensor: Tensor, numbers: int) -> bool:
    """Whether each run of so many numbers that starts at a multiple of them can be read at once."""
    return not (
        tensor.data_ptr() % (numbers * tensor.element_size())
        or tensor.stride(1) % numbers
        or (tensor.shape[0] > 1 and tensor.stride(0) % numbers)
    )
