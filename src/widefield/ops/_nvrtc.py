"""CUDA C++ compiled when it is first used: nothing is built at install.

The compiler (NVRTC) and the driver are reached through cuda-bindings, which torch's own CUDA wheels
bring along. Compiled kernels are kept in the user's cache folder, under a hash of the source, the
macros, the architecture and the compiler's version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from widefield.errors import WidefieldError

__all__ = ["Kernel", "available", "build", "cache_folder", "current_stream", "source_of"]

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@functools.cache
def available(device: int = 0) -> bool:
    """Whether CUDA C++ can be compiled and run here, on this GPU."""
    if importlib.util.find_spec("cuda") is None:
        return False
    if importlib.util.find_spec("cuda.bindings") is None or not torch.cuda.is_available():
        return False
    try:
        return _architecture(device) in _architectures()
    except (ImportError, RuntimeError, WidefieldError):
        return False


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "widefield" / "kernels"


@dataclass(frozen=True)
class Kernel:
    """A kernel of one device, ready to launch."""

    function: Any
    threads: int
    shared: int

    def launch(
        self, grid: tuple[int, int, int], parameters: ctypes.Structure | ctypes.Array[ctypes.c_char]
    ) -> None:
        """Launch on torch's current stream; the kernel's one parameter is a struct.

        Args:
            grid: how many blocks.
            parameters: the struct, or its bytes, copied by the driver before this returns.

        Raises:
            WidefieldError: if the driver refuses the launch.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        stream = current_stream()
        launch = functools.partial(
            _driver().cuLaunchKernel, self.function, *grid, self.threads, 1, 1, self.shared, stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip
        status = launch()[0]
        if status and int(status) == _NO_CONTEXT:
            _enter_context()
            status = launch()[0]
        if status:
            _check((status,))


def _enter_context() -> None:
    """Give torch's context to a thread that has not used the GPU yet, as any call of its does."""
    torch.cuda.mem_get_info()


def current_stream() -> int:
    """Torch's, without an object around it, which takes longer to make than a launch."""
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())  # type: ignore[attr-defined]


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def source_of(path: Path) -> str:
    """The text of a source file, with the files of ours that it includes."""
    return re.sub(
        r'^#include "([\w./]+)"$',
        lambda found: (path.parent / found[1]).read_text("utf-8"),
        path.read_text("utf-8"),
        flags=re.MULTILINE,
    )


def build(
    source: Path,
    name: str,
    macros: Mapping[str, int],
    *,
    threads: int,
    shared: int,
    only_here: bool = False,
) -> Kernel:
    """Compile, or find in the cache, and load on the current device.

    Args:
        source: the file with the kernel.
        name: the kernel in it, declared `extern "C"`.
        macros: what to define.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        only_here: with the instructions that later GPUs do not have, like Hopper's tensor cores.

    Raises:
        WidefieldError: if it does not compile or load; the message holds the compiler's log.
    """
    from cuda.bindings import driver

    architecture = f"sm_{_architecture(torch.cuda.current_device())}{'a' if only_here else ''}"
    options = [f"--gpu-architecture={architecture}"]
    options += ["--std=c++17"]
    options += [f"-D{key}={int(value)}" for key, value in sorted(macros.items())]
    image = _image(source_of(source), source.name, options)
    _enter_context()
    (module,) = _check(driver.cuModuleLoadData(image))
    (function,) = _check(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared))
    return Kernel(function, threads, shared)


def _image(source: str, name: str, options: list[str]) -> bytes:
    """Machine code, from the cache where it is there."""
    key = "\0".join([source, *options, *map(str, _version())])
    path = (
        cache_folder() / f"{Path(name).stem}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    )
    try:
        return path.read_bytes()
    except OSError:
        image = _compile(source, name, options)
        _keep(path, image)
        return image


def _keep(path: Path, image: bytes) -> None:
    """Write whole or not at all; a folder that cannot be written costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, path)
    except OSError:
        return


def _compile(source: str, name: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    (program,) = _check(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        flags = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            (size,) = _check(nvrtc.nvrtcGetProgramLogSize(program))
            log = bytearray(size)
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode(errors="replace").strip("\0\n")
            raise WidefieldError(f"{name} does not compile with {' '.join(options)}: {text}")
        (size,) = _check(nvrtc.nvrtcGetCUBINSize(program))
        image = bytearray(size)
        _check(nvrtc.nvrtcGetCUBIN(program, image))
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _architecture(device: int) -> int:
    """90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _architectures() -> tuple[int, ...]:
    """What this NVRTC compiles for; a GPU can be newer than it."""
    from cuda.bindings import nvrtc

    return tuple(*_check(nvrtc.nvrtcGetSupportedArchs()))


@functools.cache
def _version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    return tuple(_check(nvrtc.nvrtcVersion()))


def _check(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of cuda-bindings gave, without its status."""
    status, *values = answer
    if int(status) != 0:
        raise WidefieldError(f"CUDA: a call was answered with {status!r}, expected success")
    return tuple(values)
