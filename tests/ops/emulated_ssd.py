"""outputs.cu on the CPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.ops import emulated_cuda
from widefield.ops import _nvrtc

_HEADERS = tuple(Path(__file__).with_name(f"emulated_{name}.h") for name in ("cuda", "ssd"))
_REPLACED = (
    "exp2_fast", "reciprocal", "max_or_nan", "half_to_float", "pack_bfloat16", "pack_half",
    "address", "copy16", "copies_commit", "copies_wait", "publish",
    "read_matrices", "read_turned", "write_matrices", "products_begin", "products_commit",
    "products_wait", "pin",
    "multiply_tiles",
)  # fmt: skip


@dataclass(frozen=True)
class EmulatedKernel:
    """Launches like `_nvrtc.Kernel`."""

    library: ctypes.CDLL

    def launch(self, grid: tuple[int, int, int], parameters: ctypes.Structure) -> None:
        """Run all blocks, one after the other."""
        assert not self.library.emulate(*grid, ctypes.byref(parameters)), "threads wait forever"


def build(
    source: Path,
    name: str,
    macros: Mapping[str, int],
    folder: Path,
    *,
    threads: int,
    shared: int,
    only_here: bool,
) -> EmulatedKernel:
    """Compile a kernel for the CPU; the same source and macros are compiled once."""
    code = _translated(_nvrtc.source_of(source), name, threads, shared)
    kernel = emulated_cuda.compiled(code, macros, folder, optimise="-O1")
    return EmulatedKernel(kernel.library)


def _translated(source: str, name: str, threads: int, shared: int) -> str:
    for function in _REPLACED:
        source, count = re.subn(
            rf"(template <\w+ \w+>\n)?__device__ __forceinline__ \w+ {function}\([^{{]*"
            r"\{(?:[^\n]+\}\n|\n.*?\n\}\n)",
            "",
            source,
            flags=re.S,
        )
        assert count == 1, function
    source, count = re.subn(
        r"__device__ __forceinline__ void multiply_turned\(.*?\n\}\n", "", source, flags=re.S
    )
    assert count == 2
    source = source.replace("extern __shared__ __align__(1024) u8 shared_memory[];", "")
    headers = "\n".join(f'#include "{path.name}"' for path in _HEADERS)
    return f"""{headers}
{source}
static void body(const void* p) {{ {name}(*static_cast<const Parameters*>(p)); }}
extern "C" int emulate(unsigned columns, unsigned rows, unsigned batch, const void* parameters) {{
    emulated_body = body, emulated_parameters = parameters;
    for (unsigned z = 0; z < batch; z++)
        for (unsigned y = 0; y < rows; y++)
            for (unsigned x = 0; x < columns; x++) {{
                blockIdx = {{x, y, z}};
                if (run_block({threads}, {shared})) return 1;
            }}
    return 0;
}}
"""
