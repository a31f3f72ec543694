"""wide.cu on the CPU, as emulated_cuda.py does it for forward.cu."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.ops.emulated_cuda import EmulatedKernel, compiled
from widefield.ops import _nvrtc

_HEADER = Path(__file__).with_name("emulated_cuda.h")
_REPLACED = (
    "exp2_fast", "reciprocal", "max_or_nan", "half_to_float", "pack_bfloat16", "pack_half",
    "prefetch",
    "copy_begin",
    "copies_end",
)  # fmt: skip
_EMULATED = """
static void prefetch(const void*) {}
static void copy_begin(float* to, const float* from) { *to = *from; }
static void copies_end() {}
static unsigned pack_bfloat16(float low, float high) {
    return rounded(low, true) | rounded(high, true) << 16;
}
static unsigned pack_half(float low, float high) {
    return rounded(low, false) | rounded(high, false) << 16;
}
"""


def build(
    source: Path, name: str, macros: Mapping[str, int], folder: Path, *, threads: int, shared: int
) -> EmulatedKernel:
    """Compile a kernel for the CPU; the same source and macros are compiled once."""
    code = _translated(_nvrtc.source_of(source), name, threads, shared)
    return compiled(code, macros, folder, optimise="-O1")


def _translated(source: str, name: str, threads: int, shared: int) -> str:
    for function in _REPLACED:
        source, count = re.subn(
            rf"__device__ __forceinline__ \w+ {function}\(.*?\n\}}\n", "", source, flags=re.S
        )
        assert count == 1, function
    source = source.replace(
        "extern __shared__ __align__(16) float buffers[];", "float* buffers = emulated_shared;"
    )
    return f"""#include "{_HEADER.name}"
{_EMULATED}
{source}
static void body(const void* p) {{ {name}(*static_cast<const Parameters*>(p)); }}
extern "C" int emulate(unsigned columns, unsigned rows, const void* parameters) {{
    emulated_body = body, emulated_parameters = parameters;
    for (unsigned y = 0; y < rows; y++)
        for (unsigned x = 0; x < columns; x++) {{
            blockIdx = {{x, y, 0}};
            if (run_block({threads}, {shared})) return 1;
        }}
    return 0;
}}
"""
