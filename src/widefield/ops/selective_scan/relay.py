"""The forward of the selective scan in CUDA C++ for few long rows: layouts and launches.

The kernel is in relay.cu: a cluster of blocks walks through the tokens of a group of channels, and
its warps take pieces of them by turns and hand the states on. Clusters share the tokens of all
groups evenly.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops._backend import on_device_of
from widefield.ops.selective_scan import _calls
from widefield.plan import LayerPlan, ScanInputs

__all__ = [
    "Launch", "Layout", "again", "keep_launch", "launch_of", "layout_of", "run", "selective_scan",
    "supports",
]  # fmt: skip

_SOURCE = Path(__file__).with_name("relay.cu")
_MOST_GROUPS = 8  # of a cluster, in the mean
_WARPS = (16, 12, 8, 6, 4, 2)
_COLUMNS = {8: 0.56, 16: 1.0, 32: 1.9}  # what a group takes, by its channels
_LONGEST = 1 << 30  # tokens, which the kernel counts in 32 bits
# The struct begins with pointers: to what `_calls.read` gives, and to what `run` makes. So launches
# can be kept for the next call.
_POINTERS = (
    "x", "delta", "B", "C", "z", "skip", "bias", "A", "floor", "scale", "decay", "initial", "valid",
    "ends", "y", "final", "arrived",
)  # fmt: skip
_PACKED = struct.Struct(f"{len(_POINTERS)}Q")
_MOST = 4096  # launches that are kept


@dataclass(frozen=True)
class Layout:
    """How clusters of blocks share channels and tokens among their warps.

    Attributes:
        clusters: how many there are for all rows; for each, where sequences lie side by side.
        cluster: blocks of a cluster.
        warps: of a block, at least 2.
        columns: channels of a group: 8, 16 or 32.
        tile: tokens that a lane has in registers: 4, 8 or 16.
    """

    clusters: int = 1
    cluster: int = 1
    warps: int = 16
    columns: int = 16
    tile: int = 16

    @property
    def squads(self) -> int:
        """Of a block: warps whose pieces follow each other."""
        return self.warps // 4 if self.cluster > 1 and self.warps % 4 == 0 else 1

    def groups(self, rows: int, channels: int) -> int:
        """Of all rows with so many channels."""
        return rows * -(-channels // self.columns)

    def segments(self, groups: int) -> int:
        """How many of the groups a cluster has at most, whole or in part."""
        return -(-groups // self.clusters) + (groups % self.clusters > 0)

    def shared_bytes(
        self, segments: int, states: int, kinds: tuple[int, ...], has_gate: bool
    ) -> int:
        """Shared memory of a block, as the kernel computes it.

        Args:
            segments: of a cluster.
            states: of a channel.
            kinds: of x, Δ, B, C and z.
            has_gate: whether there is a z.
        """
        widths = [4 if kind == 0 else 2 for kind in kinds]
        counts = (*[self.columns] * 2, *[states] * 2, self.columns)
        copied = [self._copied(n * width) for n, width in zip(counts, widths, strict=True)]
        if not has_gate:
            copied[4] = 16
        tiles, field = 32 // self.columns, states * self.columns
        warp = 2 * tiles * (states * (self.tile + 4) + 4) * 4 + sum(copied) + 32
        handed = (self.warps + self.squads) * field * 8
        known = 4 * (segments * (16 + field + 4 * self.columns) + self.warps + 3)
        return -(-(self.warps * warp + handed + known) // 16) * 16

    def _copied(self, row: int) -> int:
        """A tensor's part of a warp, of `row` bytes a token."""
        tiles = 32 // self.columns
        tile = -(-self.tile * row // 16) * 16 + (row % 128 if tiles > 1 else 0)
        return -(-tiles * tile // 16) * 16


class _Parameters(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        *((name, ctypes.c_longlong) for name in ("valid_token", "length")),
        *((name, ctypes.c_int) for name in ("rows", "floor_row", "scale_row", "decay_row")),
    )


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
_launches: dict[tuple[Any, ...], Launch] = {}  # by likeness


def supports(inputs: ScanInputs) -> bool:
    """Whether this forward can run the scan; gradients are not its business."""
    if not _calls.readable_on_this_gpu(inputs) or inputs.x.shape[1] >= _LONGEST:
        return False
    shape = _shape(_calls.read(inputs, LayerPlan()))
    return layout_of(inputs.x.device.index, shape) is not None


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan, layout: Layout | None = None, *, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Run a scan that is supported; the same contract as the reference, without gradients.

    Args:
        inputs: what the scan reads.
        plan: what a method asks of this layer.
        layout: to run with another one than the chosen.
        keep: whether `again` may take its launch over.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    given = _calls.read(inputs, plan)
    with on_device_of(inputs.x), torch.no_grad():
        tensors = _calls.readable(given)
        launch = launch_of(tensors, inputs.delta_softplus, layout)
        done = run(launch, tensors)
    if keep:
        keep_launch(given, tensors, inputs.delta_softplus, launch)
    return done


def launch_of(tensors: _calls.Given, softplus: bool, layout: Layout | None = None) -> Launch:
    """What to launch for tensors that the kernel can read."""
    x, delta, B, C, z, _, _, _, floor, scale, decay, _, valid, _ = tensors
    shape = _shape(tensors)
    layout = layout or layout_of(x.device.index, shape)
    assert layout is not None, "what is not supported is not launched"
    strided = (x, delta, B, C, z, valid)
    parameters = _Parameters(
        *(None for _ in _POINTERS),
        *(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in strided),
        0 if valid is None else valid.stride(1),
        x.shape[1],
        x.shape[0],
        *(0 if t is None or t.ndim == 1 else t.shape[1] for t in (floor, scale, decay)),
    )
    groups = layout.groups(shape.rows, shape.channels)
    kernel = _kernel(
        x.device.index,
        replace(layout, clusters=1),  # which is no part of the code
        layout.segments(groups),
        shape.states,
        _calls.kinds_of(tensors[:7]),
        _flags(tensors, softplus),
    )
    told = layout.clusters * shape.lines if groups % layout.clusters else 0
    grid = (layout.cluster * layout.clusters, shape.lines, 1)
    return Launch(kernel, grid, bytes(parameters)[_Parameters.x_row.offset :], told)


def run(launch: Launch, tensors: _calls.Given) -> tuple[Tensor, Tensor]:
    """Launch a kernel for tensors that it can read; gives y and the final states."""
    x, A = tensors[0], tensors[7]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = _calls.rows_of(x, tensors[13])
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


def keep_launch(given: _calls.Given, tensors: _calls.Given, softplus: bool, launch: Launch) -> None:
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
    tensors = _calls.read(inputs, plan)
    launch = _launches.get(_likeness(tensors, _places(tensors), inputs.delta_softplus))
    if launch is None:
        return None
    with on_device_of(inputs.x):
        return run(launch, tensors)


def _places(tensors: _calls.Given) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _likeness(tensors: _calls.Given, places: list[int], softplus: bool) -> tuple[Any, ...]:
    x, ends = tensors[0], tensors[-1]
    kinds = [None if t is None else (t.dtype, t.stride()) for t in tensors]
    shape = None if ends is None else ends.shape
    return (softplus, x.get_device(), x.shape, shape, *kinds, *(place & 15 for place in places))


class _Shape(NamedTuple):
    """What decides on the layout.

    Attributes:
        lines: sequences side by side, each of which has clusters of its own; else 1.
        rows: of a line.
        channels: of a row.
        states: of a channel.
        kinds: of x, Δ, B, C and z.
        has_gate: whether there is a z.
    """

    lines: int
    rows: int
    channels: int
    states: int
    kinds: tuple[int, ...]
    has_gate: bool


def _shape(tensors: _calls.Given) -> _Shape:
    rows, channels, states = _calls.size(tensors)
    lines, rows = (1, rows) if tensors[13] is None else (rows, 1)
    kinds, has_gate = _calls.kinds_of(tensors[:5]), tensors[4] is not None
    return _Shape(lines, rows, channels, states, kinds, has_gate)


def _flags(tensors: _calls.Given, softplus: bool) -> tuple[tuple[str, int], ...]:
    x, delta, B, C, z, *_, ends = tensors
    return (
        *_calls.flags_of(tensors, softplus),
        ("ENDS", 0 if ends is None else ends.element_size() // 4),
        ("ALIGNED", int(all(_calls.aligned(t, 16) for t in (x, delta, z) if t is not None))),
        ("ALIGNED_BC", int(_calls.aligned(B, 16) and _calls.aligned(C, 16))),
    )


@functools.lru_cache(maxsize=256)
def layout_of(device: int, shape: _Shape) -> Layout | None:
    """The clusters, their blocks and warps that take least time.

    None where states do not fit into shared memory, or the GPU has no copies in the background.
    """
    chip = torch.cuda.get_device_properties(device)
    if chip.major < 8:
        return None
    layouts = [
        layout
        for columns in _COLUMNS
        for cluster in ((1, 2) if chip.major >= 9 else (1,))
        for warps in _WARPS
        for layout in [_even(Layout(1, cluster, warps, columns), shape, chip.multi_processor_count)]
        if _shared_bytes(layout, shape) <= chip.shared_memory_per_block_optin
    ]
    times = [_time(layout, shape, chip.multi_processor_count) for layout in layouts]
    return layouts[times.index(min(times))] if layouts else None


def _even(layout: Layout, shape: _Shape, multiprocessors: int) -> Layout:
    """As many clusters as can run at once, or a multiple, but no more than there are groups."""
    groups = layout.groups(shape.rows, shape.channels)
    at_once = max(multiprocessors // layout.cluster // shape.lines, 1)
    waves = -(-groups // (at_once * _MOST_GROUPS))
    return replace(layout, clusters=min(groups, at_once * waves))


def _shared_bytes(layout: Layout, shape: _Shape) -> int:
    segments = layout.segments(layout.groups(shape.rows, shape.channels))
    return layout.shared_bytes(segments, shape.states, shape.kinds, shape.has_gate)


def _time(layout: Layout, shape: _Shape, multiprocessors: int) -> float:
    """Milliseconds for 65,536 tokens, as measured on an H200.

    A block takes as long for a group as its warps take turns on its multiprocessor; two blocks that
    share groups wait a little for each other.
    """
    groups = layout.groups(shape.rows, shape.channels)
    waves = -(-layout.clusters * shape.lines // (multiprocessors // layout.cluster))
    shared = 1.055 if layout.cluster > 1 else 1.0
    alone = shared * (0.6 + 5.8 / layout.warps) * _COLUMNS[layout.columns]
    each = groups / layout.clusters / layout.cluster
    return waves * (0.01 + each * alone) * shape.states / 16


@functools.cache
def _kernel(
    device: int,
    layout: Layout,
    segments: int,
    states: int,
    kinds: tuple[int, ...],
    flags: tuple[tuple[str, int], ...],
) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    shared = layout.shared_bytes(segments, states, kinds[:5], bool(dict(flags)["HAS_Z"]))
    macros = {
        **_calls.kind_macros(kinds),
        **dict(flags),
        **{name.upper(): value for name, value in asdict(layout).items() if name != "clusters"},
        "SEGMENTS": segments,
        "PER_LANE": 1,
        "WIDE": 1,
        "STATES": states,
        "SHARED": shared,
    }
    return _nvrtc.build(
        _SOURCE, "selective_scan_relay", macros, threads=32 * layout.warps, shared=shared
    )
