"""wide.cu on the CPU, as emulated_cuda.py does it for forward.cu."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.ops.emulated_cuda import EmulatedKernel, compiler
from widefield.ops import _nvrtc

_HEADER = Path(__file__).with_name("emulated_cuda.h")
_REPLACED = (
    "exp2_fast", "reciprocal", "max_or_nan", "half_to_float", "pack_bfloat16", "pack_half",
    "multiply_add",
    "prefetch",
    "copy_begin",
    "copies_end",
)  # fmt: skip
_EMULATED = """
static void prefetch(const void*) {}
static void copy_begin(float* to, const float* from) { *to = *from; }
static void copies_end() {}
static void everyones(float (&of)[32], float mine) {
    Warp& warp = warps[current / 32];
    std::memcpy(&warp.values[current % 32], &mine, 4);
    __syncwarp();
    std::memcpy(of, warp.values, sizeof of);
    __syncwarp();
}
static float cut(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
static void multiply_add(float (&d)[4], const float* a, float b0, float b1) {
    float A[4][32], B[2][32];
    for (int i = 0; i < 4; i++) everyones(A[i], cut(a[i]));
    everyones(B[0], cut(b0)), everyones(B[1], cut(b1));
    unsigned lane = current % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++) {
            unsigned column = lane % 4 * 2 + i % 2;
            d[i] += A[k / 4 * 2 + i / 2][lane / 4 * 4 + k % 4] * B[k / 4][column * 4 + k % 4];
        }
}
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
    flags = [f"-D{key}={int(value)}" for key, value in sorted(macros.items())]
    key = hashlib.sha256("\0".join([code, *flags]).encode()).hexdigest()[:24]
    path = folder / f"{key}.so"
    if not path.exists():
        text = folder / f"{key}.cpp"
        text.write_text(code, encoding="utf-8")
        command = [compiler() or "g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC",
                   "-fno-strict-aliasing", "-ffp-contract=off", f"-I{_HEADER.parent}", *flags,
                   str(text), "-o", str(path)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return EmulatedKernel(ctypes.CDLL(str(path)))


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
