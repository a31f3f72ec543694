"""The forward of the selective scan in CUDA C++: which variant runs, and its launch."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops.selective_scan import _calls
from widefield.plan import LayerPlan, ScanInputs

__all__ = ["Layout", "launch_of", "selective_scan", "supports", "time_of"]

_SOURCE = Path(__file__).with_name("forward.cu")
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
        return buffers + 4 * handed + 12 * self.channels


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
# Milliseconds of a wave of blocks, of so many channels each; as measured on an H200.
_TIMES = {
    "brief": {4: 0.53, 8: 0.68, 12: 0.92, 16: 1.15},
    "exact": {4: 0.70, 8: 0.83, 12: 1.09},
}


class _Parameters(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _calls.POINTERS),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        *((f"{name}_token", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        ("length", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("channels", "floor_row", "scale_row", "decay_row")),
    )  # fmt: skip


def supports(inputs: ScanInputs) -> bool:
    """Whether this forward can run the scan; gradients are not its business."""
    large = (inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z)
    return (
        inputs.A.shape[1] in _STATES
        and _calls.readable_on_this_gpu(inputs)
        and all(t is None or t.stride(1) < _FAR for t in large)
        and _capable(inputs.x.device.index)
    )


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan, layout: Layout | None = None, *, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Run a scan that is supported; the same contract as the reference, without gradients.

    Args:
        inputs: what the scan reads.
        plan: what a method asks of this layer.
        layout: to run with another one than the chosen.
        keep: whether `_calls.again` may take its launch over.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    return _calls.scan(
        inputs, plan, lambda tensors: launch_of(tensors, inputs.delta_softplus, layout), keep
    )


def time_of(inputs: ScanInputs) -> float:
    """Milliseconds that this forward would take for 65,536 tokens on an H200, roughly."""
    tensors = _calls.read(inputs, LayerPlan())
    rows, channels, states = _calls.size(tensors)
    kind = _kind(tensors)
    layout = _layout(inputs.x.device.index, rows, channels, states, kind)
    at_once = torch.cuda.get_device_properties(inputs.x.device.index).multi_processor_count
    waves = -(-rows * -(-channels // layout.channels) // at_once)
    return waves * _TIMES[kind][layout.channels] * states / 16


def _kind(tensors: _calls.Given) -> str:
    """Which layouts there are: on tensor cores, where sums rounded to bfloat16 are enough."""
    x, _, B, C, *_ = tensors
    brief = all(t.dtype == torch.bfloat16 for t in (x, B, C))
    return "brief" if brief and B.shape[2] == 16 else "exact"


def launch_of(tensors: _calls.Given, softplus: bool, layout: Layout | None = None) -> _calls.Launch:
    """What to launch for tensors that the kernel can read."""
    rows, channels, states = _calls.size(tensors)
    device = tensors[0].device.index
    layout = layout or _layout(device, rows, channels, states, _kind(tensors))
    kinds, ends = _calls.kinds_of(tensors[:7]), tensors[13]
    ends_kind = 0 if ends is None else ends.element_size() // 4
    kernel = _kernel(device, layout, states, kinds, _flags(tensors, softplus), ends_kind)
    grid = (-(-channels // layout.channels), rows, 1)
    return _calls.Launch(kernel, grid, _behind_pointers(tensors))


def _flags(tensors: _calls.Given, softplus: bool) -> tuple[bool, ...]:
    x, delta, B, C, z, skip, bias, _, floor, scale, decay, initial, valid, _ = tensors
    large = [t for t in (x, delta, z) if t is not None]
    wide = x.shape[2] % 4 == 0 and all(_calls.aligned(t, 4 * t.element_size()) for t in large)
    return (
        skip is not None,
        z is not None,
        bias is not None,
        softplus,
        *(t is not None for t in (floor, scale, decay, valid, initial)),
        wide,
        _calls.aligned(B, 16) and _calls.aligned(C, 16),
        x.dtype == torch.float32,
    )


def _behind_pointers(tensors: _calls.Given) -> bytes:
    """The struct, but for what stands in front."""
    x, *_ = tensors
    strided = (*tensors[:5], tensors[12])
    parameters = _Parameters(
        *(None for _ in _calls.POINTERS),
        *(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in strided),
        *(0 if t is None else t.stride(1) for t in strided),
        x.shape[1],
        x.shape[2],
        *(0 if t is None or t.ndim == 1 else t.shape[1] for t in tensors[8:11]),
    )
    return bytes(parameters)[_Parameters.x_row.offset :]


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
    switches = (
        "HAS_SKIP", "HAS_Z", "HAS_BIAS", "SOFTPLUS", "FLOOR", "SCALE", "DECAY", "VALID", "INITIAL",
        "WIDE", "WIDE_BC", "EXACT",
    )  # fmt: skip
    macros = {
        **_calls.kind_macros(kinds),
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
