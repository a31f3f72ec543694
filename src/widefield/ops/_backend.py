"""Which implementation of an op runs: chosen by device and dtype, or forced for a block of code."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from widefield.errors import unknown

Backend = Literal["reference", "cpu", "cuda", "triton", "nvrtc"]
BACKENDS = ("reference", "cpu", "cuda", "triton", "nvrtc")
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


def runs_kernels(*tensors: Tensor | None, backward: bool = False) -> bool:
    """Whether kernels of a GPU would run for these inputs, which have a backward or have none."""
    if torch.compiler.is_compiling() or choose(*tensors) != "cuda":
        return False
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return backward or not wants_grad


def choose(*tensors: Tensor | None) -> Literal["reference", "cpu", "cuda"]:
    """The implementation for these inputs: kernels where they exist, else the reference."""
    forced = _forced.get()
    if forced is not None:
        return "cuda" if forced in ("triton", "nvrtc") else forced
    present = [t for t in tensors if t is not None]
    device = present[0].device.type
    if torch.float64 in [t.dtype for t in present]:
        return "reference"
    if device == "cuda" and _has("triton"):
        return "cuda"
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in present)
    if device == "cpu" and not wants_grad and _has("numba") and not torch.compiler.is_compiling():
        return "cpu"
    return "reference"
