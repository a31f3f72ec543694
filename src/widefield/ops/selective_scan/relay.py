"""The forward of the selective scan in CUDA C++ for few long rows: layouts and launches.

The kernel is in relay.cu: a cluster of blocks walks through all tokens of its channels, and its
warps take pieces of them by turns and hand the states on.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops.selective_scan import _calls
from widefield.plan import LayerPlan, ScanInputs

__all__ = ["Layout", "launch_of", "layout_of", "selective_scan", "supports", "time_of"]

_SOURCE = Path(__file__).with_name("relay.cu")
_GROUPS = (1, 2, 3, 4, 5)
_WARPS = (16, 12, 8, 6, 4, 2)


@dataclass(frozen=True)
class Layout:
    """How clusters of blocks share channels and tokens among their warps.

    Attributes:
        groups: groups of channels that a cluster owns.
        cluster: blocks of a cluster.
        warps: of a block, at least 2.
        columns: channels of a group: 8, 16 or 32.
        tile: tokens that a lane has in registers: 4, 8 or 16.
    """

    groups: int = 1
    cluster: int = 1
    warps: int = 16
    columns: int = 16
    tile: int = 16

    @property
    def channels(self) -> int:
        """Of a cluster."""
        return self.columns * self.groups

    def shared_bytes(self, states: int, kinds: tuple[int, ...], has_gate: bool) -> int:
        """Shared memory of a block, as the kernel computes it.

        Args:
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
        warp = 2 * tiles * states * (self.tile + 4) * 4 + sum(copied)
        handed = (self.warps + 1) * field * 8
        known = 4 * (self.groups * field + self.columns + 5 * self.channels + self.warps)
        return -(-(self.warps * warp + handed + known) // 16) * 16

    def _copied(self, row: int) -> int:
        """A tensor's part of a warp, of `row` bytes a token."""
        tiles = 32 // self.columns
        tile = -(-self.tile * row // 16) * 16 + (row % 128 if tiles > 1 else 0)
        return -(-tiles * tile // 16) * 16


class _Parameters(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _calls.POINTERS),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        *((name, ctypes.c_longlong) for name in ("valid_token", "length")),
        *((name, ctypes.c_int) for name in ("floor_row", "scale_row", "decay_row")),
    )


def supports(inputs: ScanInputs) -> bool:
    """Whether this forward can run the scan; gradients are not its business."""
    return _calls.readable_on_this_gpu(inputs) and _fits(inputs.x.device.index, inputs.A.shape[1])


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
    layout = layout_of(inputs.x.device.index, rows, channels, states, *_narrow(tensors))
    chip = torch.cuda.get_device_properties(inputs.x.device.index)
    return _time(layout, rows, channels, chip.multi_processor_count) * states / 16


def launch_of(tensors: _calls.Given, softplus: bool, layout: Layout | None = None) -> _calls.Launch:
    """What to launch for tensors that the kernel can read."""
    x, delta, B, C, z, _, _, _, floor, scale, decay, _, valid, _ = tensors
    rows, channels, states = _calls.size(tensors)
    device = x.device.index
    layout = layout or layout_of(device, rows, channels, states, *_narrow(tensors))
    strided = (x, delta, B, C, z, valid)
    parameters = _Parameters(
        *(None for _ in _calls.POINTERS),
        *(0 if t is None or t.shape[0] == 1 else t.stride(0) for t in strided),
        0 if valid is None else valid.stride(1),
        x.shape[1],
        *(0 if t is None or t.ndim == 1 else t.shape[1] for t in (floor, scale, decay)),
    )
    kinds = _calls.kinds_of(tensors[:7])
    kernel = _kernel(device, layout, states, kinds, _flags(tensors, softplus))
    grid = (layout.cluster * -(-channels // layout.channels), rows, 1)
    return kernel, grid, bytes(parameters)[_Parameters.x_row.offset :]


def _narrow(tensors: _calls.Given) -> tuple[tuple[int, ...], bool]:
    """What decides on the size of a warp's part of shared memory."""
    return _calls.kinds_of(tensors[:5]), tensors[4] is not None


def _flags(tensors: _calls.Given, softplus: bool) -> tuple[tuple[str, int], ...]:
    x, delta, B, C, z, skip, bias, _, floor, scale, decay, initial, valid, ends = tensors
    present = {
        "HAS_SKIP": skip, "HAS_Z": z, "HAS_BIAS": bias, "FLOOR": floor, "SCALE": scale,
        "DECAY": decay, "VALID": valid, "INITIAL": initial,
    }  # fmt: skip
    tokens = {"X": x, "DELTA": delta, "B": B, "C": C, "Z": z}
    return (
        *((name, int(t is not None)) for name, t in present.items()),
        ("SOFTPLUS", int(softplus)),
        ("ENDS", 0 if ends is None else ends.element_size() // 4),
        ("EXACT", int(x.dtype == torch.float32)),
        ("CHANNELS", x.shape[2]),
        *((f"{name}_TOKEN", _calls.step_of(t)) for name, t in tokens.items()),
        ("ALIGNED", int(all(_calls.aligned(t, 16) for t in (x, delta, z) if t is not None))),
        ("ALIGNED_BC", int(_calls.aligned(B, 16) and _calls.aligned(C, 16))),
    )


@functools.lru_cache(maxsize=256)
def layout_of(
    device: int, rows: int, channels: int, states: int, kinds: tuple[int, ...], has_gate: bool
) -> Layout:
    """The groups and blocks of a cluster, and the warps, that take least time."""
    chip = torch.cuda.get_device_properties(device)
    shared = chip.shared_memory_per_block_optin
    clusters = (1, 2) if chip.major >= 9 else (1,)
    layouts = [
        Layout(groups, cluster, warps)
        for cluster in clusters
        for groups in _GROUPS
        for warps in _WARPS
        if Layout(groups, cluster, warps).shared_bytes(states, kinds, has_gate) <= shared
    ]
    return min(layouts, key=lambda one: _time(one, rows, channels, chip.multi_processor_count))


def _time(layout: Layout, rows: int, channels: int, multiprocessors: int) -> float:
    """Milliseconds for 65,536 tokens of 16 states, as measured on an H200.

    A block takes as long for a group as its warps take turns on its multiprocessor; two blocks that
    share groups wait a little for each other.
    """
    clusters = rows * -(-channels // layout.channels)
    waves = -(-clusters // (multiprocessors // layout.cluster))
    shared = 1.06 if layout.cluster > 1 else 1.0
    alone = shared * (0.3 + 11.7 / layout.warps)
    return waves * (0.02 + layout.groups / layout.cluster * alone)


@functools.cache
def _fits(device: int, states: int) -> bool:
    """Whether the GPU has copies in the background, and shared memory for so many states."""
    chip = torch.cuda.get_device_properties(device)
    needed = Layout(warps=_WARPS[-1]).shared_bytes(states, (0,) * 5, True)
    return (chip.major, chip.minor) >= (8, 0) and needed <= chip.shared_memory_per_block_optin


@functools.cache
def _kernel(
    device: int,
    layout: Layout,
    states: int,
    kinds: tuple[int, ...],
    flags: tuple[tuple[str, int], ...],
) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    shared = layout.shared_bytes(states, kinds[:5], bool(dict(flags)["HAS_Z"]))
    macros = {
        **_calls.kind_macros(kinds),
        **dict(flags),
        **{name.upper(): value for name, value in asdict(layout).items()},
        "PER_LANE": 1,
        "WIDE": 1,
        "STATES": states,
        "SHARED": shared,
    }
    return _nvrtc.build(
        _SOURCE, "selective_scan_relay", macros, threads=32 * layout.warps, shared=shared
    )
