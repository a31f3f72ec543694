"""wide.cu on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.ops.emulated_cuda import NUMBERS, EmulatedKernel, compiled, runnable, without
from widefield.ops import _nvrtc

_EMULATED = """
static void prefetch(const void*) {}
static void copy_begin(float* to, const float* from) { *to = *from; }
static void copies_end() {}
"""


def build(
    source: Path, name: str, macros: Mapping[str, int], folder: Path, *, threads: int, shared: int
) -> EmulatedKernel:
    """Compile a kernel for the CPU; the same source and macros are compiled once."""
    code = without(_nvrtc.source_of(source), (*NUMBERS, "prefetch", "copy_begin", "copies_end"))
    code = code.replace(
        "extern __shared__ __align__(16) float buffers[];", "float* buffers = emulated_shared;"
    )
    code = runnable(code, name, threads, shared, _EMULATED)
    return compiled(code, macros, folder, optimise="-O1")
