"""relay.cu on the CPU; the blocks of a cluster are emulated side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.ops.emulated_cuda import NUMBERS, EmulatedKernel, compiled, runnable, without
from widefield.ops import _nvrtc

_REPLACED = (
    *NUMBERS, "prefetch", "shared_at", "shared_of", "place_of", "rank_of_block", "meet", "look",
    "hand", "look_up", "announce", "look_far", "announce_far", "read_far", "let_others", "copy16",
    "copies_commit", "copies_wait", "opaque",
)  # fmt: skip
# An address in shared memory is an offset from the first block's.
_EMULATED = """
typedef unsigned long long u64_;
static unsigned shared_at(const void* generic) {
    return static_cast<const char*>(generic) - reinterpret_cast<char*>(emulated_shared);
}
static unsigned shared_of(unsigned block, unsigned address) {
    return address + (block - rank_of_fiber()) * 4 * (unsigned)block_shared;
}
static unsigned long place_of(unsigned address) { return address; }
static unsigned rank_of_block() { return rank_of_fiber(); }
static void meet() { meet_cluster(); }
static char* at_address(unsigned address) {
    return reinterpret_cast<char*>(emulated_shared) + address;
}
static u64_ look(unsigned from) { return *reinterpret_cast<u64_*>(at_address(from)); }
static void hand(unsigned long to, float state, unsigned tag) {
    *reinterpret_cast<u64_*>(at_address(to)) = (u64_)tag << 32 | __float_as_uint(state);
    idle = 0;
}
static unsigned look_up(unsigned from) { return *reinterpret_cast<unsigned*>(at_address(from)); }
static void announce(unsigned to, unsigned v) {
    *reinterpret_cast<unsigned*>(at_address(to)) = v;
    idle = 0;
}
static unsigned look_far(const unsigned* from) { return *from; }
static void announce_far(unsigned* to, unsigned v) { *to = v; }
static float read_far(const float* from) { return *from; }
static void let_others() { give_way(); }
static void copy16(char* to, const char* from, int count) {
    std::memset(to, 0, 16);
    std::memcpy(to, from, count);
}
static void copies_commit() {}
static void copies_wait() {}
static float opaque(float v) { return v; }
static void prefetch(const void*) {}
"""


def build(
    source: Path, name: str, macros: Mapping[str, int], folder: Path, *, threads: int, shared: int
) -> EmulatedKernel:
    """Compile a kernel for the CPU; the same source and macros are compiled once."""
    code = without(_nvrtc.source_of(source), _REPLACED)
    code = code.replace(
        "extern __shared__ __align__(16) char buffers[];",
        "char* buffers = at_address(4 * rank_of_fiber() * block_shared);",
    )
    return compiled(runnable(code, name, threads, shared, _EMULATED), macros, folder)
