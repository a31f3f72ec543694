"""The forward of the selective scan in CUDA C++: which variant runs, and its launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from widefield.ops import _nvrtc
from widefield.plan import LayerPlan, ScanInputs

_SOURCE = Path(__file__).with_name("forward.cu")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPS = {8: 8, 16: 8, 32: 8}  # lanes that share a channel, by states
_TILE, _PRODUCERS = 32, 4
_FAR = 1 << 22  # elements from token to token; lanes count bytes within a tile in 32 bits


class _Parameters(ctypes.Structure):
    """The kernel's struct of the same name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "delta", "B", "C", "z", "skip", "bias",
            "A", "floor", "scale", "decay", "initial", "valid", "y", "final",
        )),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        *((f"{name}_token", ctypes.c_longlong) for name in ("x", "delta", "B", "C", "z", "valid")),
        ("length", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("channels", "floor_row", "scale_row", "decay_row")),
    )  # fmt: skip


def supports(inputs: ScanInputs) -> bool:
    """Whether this forward can run the scan; gradients are not its business."""
    x = inputs.x
    if not (x.is_cuda and x.numel() and inputs.A.shape[1] in _GROUPS and x.shape[0] < 1 << 16):
        return False
    read = [x, inputs.delta, inputs.B, inputs.C, inputs.D, inputs.z, inputs.delta_bias]
    dense = all(
        t is None or (t.dtype in _KINDS and abs(t.stride(-2 % t.ndim)) < _FAR) for t in read
    )
    capable = torch.cuda.get_device_capability(x.device) >= (8, 0)
    return dense and capable and inputs.A.dtype == torch.float32 and _nvrtc.available()


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan, macros: Mapping[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Run a scan that is supported; the same contract as the reference, without gradients.

    Args:
        inputs: what the scan reads.
        plan: what a method asks of this layer.
        macros: to run another variant than the chosen one.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    given = _Given(inputs, plan)
    with torch.cuda.device_of(inputs.x), torch.no_grad():
        return given.run(macros or {})


class _Given:
    """The tensors of one call, as the kernel reads them."""

    def __init__(self, inputs: ScanInputs, plan: LayerPlan) -> None:
        self.x, self.delta = _dense(inputs.x), _dense(inputs.delta)
        self.B, self.C = _dense(inputs.B), _dense(inputs.C)
        self.z = None if inputs.z is None else _dense(inputs.z)
        self.A = inputs.A.contiguous()
        self.skip = None if inputs.D is None else inputs.D.contiguous()
        self.bias = None if inputs.delta_bias is None else inputs.delta_bias.contiguous()
        self.valid = inputs.valid
        state = inputs.initial_state
        self.initial = None if state is None else state.float().contiguous()
        self.floor, self.scale = _plain(plan.delta_floor), _plain(plan.delta_scale)
        self.decay = _plain(plan.decay_scale)
        self.softplus = inputs.delta_softplus

    def run(self, changes: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        batch, _, channels = self.x.shape
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        final = torch.empty(
            batch, channels, self.A.shape[1], dtype=torch.float32, device=self.x.device
        )
        macros = self.macros() | changes
        kernel = _kernel(self.x.device.index, *sorted(macros.items()))
        width = macros["CONSUMERS"] * 32 // macros["GROUP"]
        kernel.launch((-(-channels // width), batch, 1), self.parameters(y, final))
        return y, final

    def parameters(self, y: Tensor, final: Tensor) -> _Parameters:
        large = {"x": self.x, "delta": self.delta, "B": self.B, "C": self.C, "z": self.z}
        strided = {**large, "valid": self.valid}
        small = {
            "skip": self.skip, "bias": self.bias, "A": self.A, "floor": self.floor,
            "scale": self.scale, "decay": self.decay, "initial": self.initial,
        }  # fmt: skip
        values: dict[str, int] = {"y": y.data_ptr(), "final": final.data_ptr()}
        for name, tensor in (strided | small).items():
            values[name] = 0 if tensor is None else tensor.data_ptr()
        for name, tensor in strided.items():
            values[f"{name}_row"] = 0 if tensor is None else tensor.stride(0)
            values[f"{name}_token"] = 0 if tensor is None else tensor.stride(1)
        for name in ("floor", "scale", "decay"):
            tensor = small[name]
            values[f"{name}_row"] = 0 if tensor is None or tensor.ndim == 1 else tensor.shape[1]
        return _Parameters(length=self.x.shape[1], channels=self.x.shape[2], **values)

    def macros(self) -> dict[str, int]:
        """The variant for these tensors."""
        states, group = self.A.shape[1], _GROUPS[self.A.shape[1]]
        large = [t for t in (self.x, self.delta, self.z) if t is not None]
        return {
            "X_KIND": _KINDS[self.x.dtype],
            "DELTA_KIND": _KINDS[self.delta.dtype],
            "B_KIND": _KINDS[self.B.dtype],
            "C_KIND": _KINDS[self.C.dtype],
            "Z_KIND": 0 if self.z is None else _KINDS[self.z.dtype],
            "SKIP_KIND": 0 if self.skip is None else _KINDS[self.skip.dtype],
            "BIAS_KIND": 0 if self.bias is None else _KINDS[self.bias.dtype],
            "STATES": states,
            "GROUP": group,
            "CONSUMERS": self.consumers(32 // group),
            "HAS_SKIP": self.skip is not None,
            "HAS_Z": self.z is not None,
            "HAS_BIAS": self.bias is not None,
            "SOFTPLUS": self.softplus,
            "FLOOR": self.floor is not None,
            "SCALE": self.scale is not None,
            "DECAY": self.decay is not None,
            "VALID": self.valid is not None,
            "INITIAL": self.initial is not None,
            "WIDE": self.x.shape[2] % 4 == 0 and all(_aligned(t, 4) for t in large),
            "WIDE_BC": all(_aligned(t, 16 // t.element_size()) for t in (self.B, self.C)),
            "EXACT": self.x.dtype == torch.float32,
            "STAGES": 3,
        }

    def consumers(self, channels: int) -> int:
        """As many consumer warps a block as let every multiprocessor have a block, at most 3."""
        warps = self.x.shape[0] * -(-self.x.shape[2] // channels)
        return min(3, -(-warps // _multiprocessors(self.x.device.index)))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(device: int, *macros: tuple[str, int]) -> _nvrtc.Kernel:
    """One variant, compiled and loaded on the current device."""
    values = dict(macros)
    states, group, consumers = values["STATES"], values["GROUP"], values["CONSUMERS"]
    channels, per_lane = consumers * 32 // group, states // group
    parts = 8 >> values["STAGES"]
    pad = {0: 4, 1: 8, 3: 0}[values["STAGES"]]
    floats = 2 * channels * (_TILE + 4) + 2 * _TILE * per_lane // 4 * (4 * group + 4)
    floats += parts * (_TILE * channels + pad)
    shared = _PRODUCERS * floats * 4
    free = 4 - consumers if consumers < 4 else 4
    warps = consumers + (_PRODUCERS - 1) % free + 1 + 4 * ((_PRODUCERS - 1) // free)
    values |= {"WARPS": warps, "SHARED": shared}
    return _nvrtc.build(
        _SOURCE, "selective_scan_forward", values, threads=32 * warps, shared=shared
    )


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _plain(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()


def _aligned(tensor: Tensor, numbers: int) -> bool:
    """Whether each run of so many numbers that starts at a multiple of them can be read at once."""
    strides = (tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1))
    return tensor.data_ptr() % (numbers * tensor.element_size()) == 0 and not any(
        stride % numbers for stride in strides
    )
