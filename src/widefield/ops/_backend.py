"""Which implementation of an op runs: chosen by device and dtype, or forced for a block of code."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from widefield.errors import unknown

Backend = Literal["reference", "cpu", "cuda", "triton", "nvrtc"]
BACKENDS = ("reference", "cpu", "cuda", "triton", "nvrtc")
_HERE = nullcontext()
_forced: ContextVar[Backend | None] = ContextVar("widefield_backend", default=None)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the ops inside the block with one implementation, whatever the device.

    Args:
        name: "reference" (plain torch), "cpu" (numba), or a GPU's kernels: "cuda", whichever is
            the fastest; "triton", those in Triton only; "nvrtc", the same as "cuda".
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def on_gpu(op: str) -> Any:
    """The module with an op's kernels for a GPU; an import statement in each call takes longer."""
    return importlib.import_module(f"widefield.ops.{op}.cuda")


def forced_backend() -> Backend | None:
    """The implementation that a block of code has asked for by name, or None."""
    return _forced.get()


def is_forced() -> bool:
    """Whether a block of code has asked for one implementation by name."""
    return _forced.get() is not None


def wants_cuda_cpp() -> bool:
    """Whether kernels in CUDA C++ may run, where there are some."""
    return _forced.get() != "triton"


def kernels_on(device: torch.device) -> str:
    """Which kernels the ops have for a device, in words."""
    if device.type == "cpu":
        return "numba" if _has("numba") else "none, plain torch: numba is not installed"
    if device.type != "cuda" or not _has("triton"):
        return "none, plain torch" + (": Triton is not installed" if device.type == "cuda" else "")
    from widefield.ops import _nvrtc

    if _nvrtc.available(device.index or 0):
        return "CUDA C++ and Triton"
    return "Triton; those in CUDA C++ need cuda-bindings and an NVRTC for this GPU"


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one for a block; costs nothing where it is already."""
    index = tensor.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


def runs_kernels(*tensors: Tensor | None) -> bool:
    """Whether kernels of a GPU that have no backward would run for these inputs."""
    if is_compiling() or choose(*tensors) != "cuda":
        return False
    return not (is_grad_enabled() and _want_gradients(tensors))


def choose(*tensors: Tensor | None) -> Literal["reference", "cpu", "cuda"]:
    """The implementation for these inputs: kernels where they exist, else the reference."""
    forced = _forced.get()
    if forced is not None:
        return "cuda" if forced in ("triton", "nvrtc") else forced
    on_gpu, first = False, True
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            return "reference"
        if first:
            first, on_gpu = False, tensor.is_cuda
    if on_gpu:
        return "cuda" if _has("triton") else "reference"
    on_cpu = next(t for t in tensors if t is not None).is_cpu
    wants_grad = is_grad_enabled() and _want_gradients(tensors)
    if on_cpu and not wants_grad and _has("numba") and not is_compiling():
        return "cpu"
    return "reference"


def _want_gradients(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)
