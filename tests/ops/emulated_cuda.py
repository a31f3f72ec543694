"""Kernels in CUDA C++ on the CPU: their own source, its few lines of PTX exchanged, in fibers."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_HEADER = Path(__file__).with_name("emulated_cuda.h")
NUMBERS = (
    "exp2_fast", "reciprocal", "max_or_nan", "half_to_float", "pack_bfloat16", "pack_half",
)  # fmt: skip


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++")


@dataclass(frozen=True)
class EmulatedKernel:
    """Launches like `_nvrtc.Kernel`."""

    library: ctypes.CDLL

    def launch(self, grid: tuple[int, int, int], parameters: ctypes.Structure) -> None:
        """Run all blocks, one after the other."""
        assert not self.library.emulate(*grid[:2], ctypes.byref(parameters)), "threads wait forever"


def compiled(
    code: str, macros: Mapping[str, int], folder: Path, optimise: str = "-O0"
) -> EmulatedKernel:
    """The kernel in code that has been translated for the CPU; compiled once."""
    flags = [f"-D{key}={int(value)}" for key, value in sorted(macros.items())]
    key = hashlib.sha256("\0".join([code, *flags]).encode()).hexdigest()[:24]
    path = folder / f"{key}.so"
    if not path.exists():
        text = folder / f"{key}.cpp"
        text.write_text(code, encoding="utf-8")
        command = [compiler() or "g++", "-std=c++20", optimise, "-w", "-shared", "-fPIC",
                   "-fno-strict-aliasing", "-ffp-contract=off", f"-I{_HEADER.parent}", *flags,
                   str(text), "-o", str(path)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return EmulatedKernel(ctypes.CDLL(str(path)))


def without(source: str, functions: Iterable[str]) -> str:
    """The source without some of its device functions, which are written for the CPU instead."""
    for function in functions:
        source, count = re.subn(
            rf"__device__ __forceinline__ [\w ]+ {function}\(.*?\}}\n(?=\S|\n)",
            "",
            source,
            flags=re.S,
            count=1,
        )
        assert count == 1, function
    return source


def runnable(source: str, name: str, threads: int, shared: int, before: str = "") -> str:
    """Code that runs a kernel's blocks, and clusters of blocks, one after the other.

    Args:
        source: with all that the CPU cannot compile taken out.
        name: the kernel.
        threads: of a block.
        shared: bytes of shared memory of a block.
        before: what stands in for what was taken out, behind the common header.
    """
    return f"""#include "{_HEADER.name}"
{before}
{source}
#ifndef CLUSTER
#define CLUSTER 1
#endif
static void body(const void* p) {{ {name}(*static_cast<const Parameters*>(p)); }}
extern "C" int emulate(unsigned columns, unsigned rows, const void* parameters) {{
    emulated_body = body, emulated_parameters = parameters, gridDim = {{columns, rows, 1}};
    for (unsigned y = 0; y < rows; y++)
        for (unsigned x = 0; x < columns; x += CLUSTER) {{
            blockIdx = {{x, y, 0}};
            if (run_block({threads}, {shared}, CLUSTER)) return 1;
        }}
    return 0;
}}
"""
