"""The selective scan in CUDA C++ for many rows, differentiable: layouts, launches, gradients.

The kernels are in wide.cu: a lane walks through its channels from the first token to the last, so
there must be enough rows and channels to fill the GPU; for few of them there is relay.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.ops.selective_scan import _calls
from widefield.plan import LayerPlan, ScanInputs

__all__ = [
    "Layout",
    "backward_layout",
    "forward_layout",
    "selective_scan",
    "supports",
    "wants_gradients",
]

_SOURCE = Path(__file__).with_name("wide.cu")
_STATES = 256
_SAVED = 1 << 30  # bytes of saved states from which on there are half as many
_PAIRS = 1 << 16  # channels of all rows together from which on the forward takes two a lane


@dataclass(frozen=True)
class Layout:
    """How a kernel cuts up its work.

    Attributes:
        per_lane: channels a lane, 1 or 2.
        tile: tokens that are in registers at once: 4, 8 or 16.
        chunk: tokens from one saved state to the next, a multiple of `tile`.
        warps: of a block.
        blocks: that shall fit on a multiprocessor; bounds the registers.
    """

    per_lane: int = 1
    tile: int = 16
    chunk: int = 32
    warps: int = 4
    blocks: int = 4

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.warps * 32 * self.per_lane

    def shared_bytes(self, states: int, backward: bool) -> int:
        """Shared memory of a block, as the kernel computes it."""
        column, square = 32 * self.per_lane * states, self.tile * states
        if not backward:
            return 4 * self.warps * (2 * column + 2 * square)
        return 4 * self.warps * ((3 + self.chunk // self.tile) * column + 6 * square)


def forward_layout(states: int, shared: int) -> Layout:
    """The layout of the forward where a block may have `shared` bytes of shared memory."""
    return _fitted(Layout(chunk=16), states, shared, backward=False)


def backward_layout(states: int, shared: int) -> Layout:
    """The same for the backward."""
    return _fitted(Layout(chunk=16, blocks=2), states, shared, backward=True)


def _fitted(layout: Layout, states: int, shared: int, backward: bool) -> Layout:
    if states > 32:
        layout = replace(layout, tile=4 if states > 128 else 8, blocks=1)
    while layout.shared_bytes(states, backward) > shared and layout.warps > 1:
        layout = replace(layout, warps=layout.warps // 2)
    while layout.shared_bytes(states, backward) > shared and layout.chunk > layout.tile:
        layout = replace(layout, chunk=layout.chunk // 2)
    return layout


def _layouts_of(inputs: ScanInputs) -> tuple[Layout, Layout]:
    """Of the forward and the backward; measured on an H200, see benchmarks/LOG.md."""
    x, states = inputs.x, inputs.A.shape[1]
    forward, backward = _layouts(x.device.index, states)
    if 4 * states * x.numel() > backward.chunk * _SAVED:
        sparse = replace(backward, chunk=2 * backward.chunk)
        if sparse.shared_bytes(states, backward=True) <= _shared_memory(x.device.index):
            backward = sparse
    if _calls.rows_of(x, inputs.cu_seqlens) * x.shape[2] >= _PAIRS and states <= 32:
        forward = replace(forward, per_lane=2, tile=8)
    return replace(forward, chunk=backward.chunk), backward


class _Parameters(ctypes.Structure):
    """The kernels' struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "delta", "B", "C", "z", "skip", "bias", "A", "floor", "scale", "decay", "initial",
            "valid", "bounds", "y", "final", "saved", "dy", "dfinal", "dx", "ddelta", "dz",
            "dA", "dB", "dC", "dskip", "dbias", "dinitial",
        )),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        *((name, ctypes.c_longlong) for name in ("valid_token", "length", "part")),
        *((name, ctypes.c_int) for name in ("floor_row", "scale_row", "decay_row")),
    )  # fmt: skip


# The pointers behind those of a call's own tensors.
_MADE = [field[0] for field in _Parameters._fields_ if field[1] is ctypes.c_void_p][14:]


def supports(inputs: ScanInputs) -> bool:
    """Whether these kernels can run the scan, gradients included."""
    states = inputs.A.shape[1]
    return (
        states <= _STATES
        and _calls.readable_on_this_gpu(inputs)
        and _fits(inputs.x.device.index, states)
    )


def selective_scan(inputs: ScanInputs, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """Run a scan that is supported; the same contract as the reference, gradients included.

    Args:
        inputs: what the scan reads.
        plan: what a method asks of this layer.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    if not wants_gradients(inputs):
        with torch.no_grad():
            return Call.prepare(inputs, plan).forward(save=False)[:2]
    return _Scan.apply(*_leaves(inputs), inputs, plan)


def wants_gradients(inputs: ScanInputs) -> bool:
    """Whether autograd will ask for the gradient of any of them."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in _leaves(inputs)
    )


def _leaves(inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    return (
        inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z,
        inputs.delta_bias, inputs.initial_state,
    )  # fmt: skip


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, z: Tensor | None, bias: Tensor | None, initial: Tensor | None,
        inputs: ScanInputs, plan: LayerPlan,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        call = Call.prepare(inputs, plan)
        y, final, saved = call.forward(save=True)
        ctx.call, ctx.saved = call.without_tensors(), [t is not None for t in call.tensors]
        ctx.save_for_backward(*(t for t in call.tensors if t is not None), saved)
        ctx.has_initial = initial is not None
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, saved = ctx.saved_tensors
        given = iter(tensors)
        call = replace(
            ctx.call, tensors=tuple(next(given) if there else None for there in ctx.saved)
        )
        *gradients, dinitial = call.backward(dy, dfinal, saved)
        return *gradients, dinitial if ctx.has_initial else None, None, None


@dataclass(frozen=True)
class Call:
    """One call's tensors as the kernels read them, and which variant of the kernels that takes.

    Attributes:
        tensors: x, delta, B, C, z, skip, bias, A, floor, scale, decay, initial, valid, bounds.
        softplus: whether Δ is made by a softplus.
        layouts: of the forward and the backward.
    """

    tensors: tuple[Any, ...]
    softplus: bool
    layouts: tuple[Layout, Layout]

    @staticmethod
    def prepare(
        inputs: ScanInputs, plan: LayerPlan, layouts: tuple[Layout, Layout] | None = None
    ) -> Call:
        """Copy what the kernels could not read as it is."""
        *tensors, ends = _calls.readable(_calls.read(inputs, plan))
        return Call(
            (*tensors, _bounds(ends, inputs.x.device)),
            inputs.delta_softplus,
            layouts or _layouts_of(inputs),
        )

    def without_tensors(self) -> Call:
        """What autograd may keep beside the tensors that it saves itself."""
        return replace(self, tensors=())

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return _calls.rows_of(self.tensors[0], self.tensors[13])

    @property
    def chunks(self) -> int:
        """How many states are saved, all rows together."""
        x, bounds, chunk = self.tensors[0], self.tensors[13], self.layouts[0].chunk
        if bounds is None:
            return x.shape[0] * -(-x.shape[1] // chunk)
        return x.shape[1] // chunk + self.rows

    def forward(self, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gives y, the final states, and the saved states (chunks, N, D)."""
        x, A = self.tensors[0], self.tensors[7]
        channels, states = A.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = A.new_empty(self.rows, channels, states)
        saved = A.new_empty(self.chunks, states, channels) if save else None
        self._launch(False, save, {"y": y, "final": final, "saved": saved})
        return y, final, saved

    def backward(self, dy: Tensor, dfinal: Tensor, saved: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, Δ, A, B, C, skip, z, bias and the initial state."""
        x, delta, B, C, z, skip, bias, A = self.tensors[:8]
        dy = dy.contiguous()
        dx, ddelta, dz = (None if t is None else _new_like(t) for t in (x, delta, z))
        row = A.new_empty(2, self.rows, A.shape[0])
        dA, dinitial = A.new_empty(2, self.rows, *A.shape)
        blocks = -(-A.shape[0] // self.layouts[1].channels)
        dB, dC = A.new_empty(2, blocks, *B.shape)
        made = {
            "dy": dy if _aligned(dy) else dy.clone(), "dfinal": dfinal.contiguous(), "saved": saved,
            "dx": dx, "ddelta": ddelta, "dz": dz, "dA": dA, "dinitial": dinitial,
            "dB": dB, "dC": dC, "dskip": row[0], "dbias": row[1],
        }  # fmt: skip
        self._launch(True, False, made)
        return (
            dx, ddelta, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
            None if skip is None else row[0].sum(0).to(skip.dtype),
            dz,
            None if bias is None else row[1].sum(0).to(bias.dtype),
            dinitial,
        )  # fmt: skip

    def _launch(self, backward: bool, save: bool, more: Mapping[str, Tensor | None]) -> None:
        x, channels = self.tensors[0], self.tensors[0].shape[2]
        layout = self.layouts[backward]
        with torch.cuda.device_of(x):
            kernel = _kernel(
                x.device.index, layout, self.tensors[7].shape[1], self._kinds(),
                self._flags(backward, save, layout),
            )  # fmt: skip
            kernel.launch((-(-channels // layout.channels), self.rows, 1), self._parameters(more))

    def _kinds(self) -> tuple[int, ...]:
        return _calls.kinds_of(self.tensors[:7])

    def _flags(self, backward: bool, save: bool, layout: Layout) -> tuple[tuple[str, int], ...]:
        large = [t for t in (*self.tensors[:2], self.tensors[4]) if t is not None]
        return (
            *_calls.flags_of(self.tensors, self.softplus),
            ("PACKED", int(self.tensors[13] is not None)),
            ("SAVE", save),
            ("BACKWARD", backward),
            ("WIDE", layout.per_lane == 1 or all(_aligned(t) for t in large)),
        )

    def _parameters(self, more: Mapping[str, Tensor | None]) -> _Parameters:
        x, delta, B, C, z, *_, valid, _ = self.tensors
        strided = (x, delta, B, C, z, valid)
        pointers = (*self.tensors, *(more.get(name) for name in _MADE))
        return _Parameters(
            *(0 if t is None else t.data_ptr() for t in pointers),
            *(0 if t is None else t.stride(0) for t in strided),
            0 if valid is None else valid.stride(1),
            x.shape[1],
            x.shape[0] * x.shape[1],
            *(0 if t is None or t.ndim == 1 else t.shape[1] for t in self.tensors[8:11]),
        )


@functools.cache
def _fits(device: int, states: int) -> bool:
    """Whether the GPU has bfloat16, and shared memory for so many states."""
    needed = _layouts(device, states)[1].shared_bytes(states, backward=True)
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 0) and needed <= _shared_memory(device)


@functools.cache
def _layouts(device: int, states: int) -> tuple[Layout, Layout]:
    shared = _shared_memory(device)
    return forward_layout(states, shared), backward_layout(states, shared)


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _kernel(
    device: int,
    layout: Layout,
    states: int,
    kinds: tuple[int, ...],
    flags: tuple[tuple[str, int], ...],
) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    shared = layout.shared_bytes(states, bool(dict(flags)["BACKWARD"]))
    macros = {
        **_calls.kind_macros(kinds),
        **dict(flags),
        **{name.upper(): value for name, value in asdict(layout).items()},
        "STATES": states,
        "SHARED": shared,
    }
    return _nvrtc.build(
        _SOURCE, "selective_scan_wide", macros, threads=32 * layout.warps, shared=shared
    )


def _new_like(tensor: Tensor) -> Tensor:
    """Dense, however the tensor lies."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _bounds(ends: Tensor | None, device: torch.device) -> Tensor | None:
    return None if ends is None else ends.to(device, torch.int64).contiguous()


def _aligned(tensor: Tensor) -> bool:
    """Whether channels 2 i and 2 i + 1 of any token can be read at once."""
    return not (
        tensor.shape[2] % 2
        or tensor.data_ptr() % (2 * tensor.element_size())
        or tensor.stride(1) % 2
        or (tensor.shape[0] > 1 and tensor.stride(0) % 2)
    )
