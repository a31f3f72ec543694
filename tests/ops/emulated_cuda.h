// Just enough of CUDA to run one kernel on the CPU, block after block: every thread is a fiber, and
// fibers take turns where a thread would wait. For tests of what a kernel computes, not of races.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned v) { float r; std::memcpy(&r, &v, 4); return r; }
static unsigned __float_as_uint(float v) { unsigned r; std::memcpy(&r, &v, 4); return r; }
using std::max;
using std::min;

static Index threadIdx, blockIdx, gridDim;
static float* emulated_shared;

// ---- fibers ---------------------------------------------------------------------------------------

struct Meeting {
    unsigned arrived = 0, turn = 0;
};
struct Warp {
    Meeting meeting;
    unsigned values[32];
};
static std::vector<ucontext_t> fibers;
static std::vector<bool> over;
static std::vector<Warp> warps;
static std::vector<Meeting> blocks;  // of a cluster
static Meeting everybody;
static unsigned block_threads;
static unsigned long block_shared;  // floats from one block's shared memory to the next one's
static ucontext_t scheduler;
static unsigned current;
static unsigned long long idle;  // turns in a row in which nobody got on

static void give_way() {
    swapcontext(&fibers[current], &scheduler);
}
static void meet(Meeting& meeting, unsigned size) {
    unsigned turn = meeting.turn;
    idle = 0;
    if (++meeting.arrived == size) meeting.arrived = 0, meeting.turn++;
    while (meeting.turn == turn) give_way();
    idle = 0;
}
static unsigned rank_of_fiber() { return current / block_threads; }
static void __syncthreads() { meet(blocks[rank_of_fiber()], block_threads); }
static void meet_cluster() { meet(everybody, fibers.size()); }
static void __syncwarp() { meet(warps[current / 32].meeting, 32); }

template <typename T>
static T from_lane(T value, unsigned lane) {
    Warp& warp = warps[current / 32];
    std::memcpy(&warp.values[current % 32], &value, 4);
    __syncwarp();
    std::memcpy(&value, &warp.values[lane], 4);
    __syncwarp();
    return value;
}
template <typename T>
static T __shfl_sync(unsigned, T value, int lane) { return from_lane(value, lane); }
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
    return from_lane(value, current % 32 ^ mask);
}
template <typename T>
static T __shfl_up_sync(unsigned, T value, int lanes) {
    int lane = current % 32;
    return from_lane(value, lane < lanes ? lane : lane - lanes);
}
static bool __all_sync(unsigned, bool value) {
    bool all = true;
    warps[current / 32].values[current % 32] = value;
    __syncwarp();
    for (unsigned v : warps[current / 32].values) all = all && v;
    __syncwarp();
    return all;
}

template <typename Choose>
static int over_lanes(int value, Choose choose) {
    Warp& warp = warps[current / 32];
    warp.values[current % 32] = value;
    __syncwarp();
    for (unsigned v : warp.values) value = choose(value, (int)v);
    __syncwarp();
    return value;
}
static int __reduce_min_sync(unsigned, int value) {
    return over_lanes(value, [](int a, int b) { return min(a, b); });
}
static int __reduce_max_sync(unsigned, int value) {
    return over_lanes(value, [](int a, int b) { return max(a, b); });
}

// ---- what the kernel writes in PTX ------------------------------------------------------------------

static float exp2_fast(float v) {
    float r = std::exp2(v);
    return r < 1.17549435e-38f ? 0.0f : r;
}
static float reciprocal(float v) { return 1.0f / v; }
static float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : max(a, b); }
static float half_to_float(unsigned short bits) {
    _Float16 r;
    std::memcpy(&r, &bits, 2);
    return r;
}
static unsigned rounded(float v, bool bfloat) {
    unsigned short half;
    _Float16 narrow = v;
    std::memcpy(&half, &narrow, 2);
    if (!bfloat) return half;
    unsigned bits = __float_as_uint(v);
    return std::isnan(v) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned pack_bfloat16(float low, float high) {
    return rounded(low, true) | rounded(high, true) << 16;
}
static unsigned pack_half(float low, float high) {
    return rounded(low, false) | rounded(high, false) << 16;
}

// ---- launch -----------------------------------------------------------------------------------------

static void (*emulated_body)(const void*);
static const void* emulated_parameters;
static void enter() {
    emulated_body(emulated_parameters);
    over[current] = true;
    idle = 0;
    swapcontext(&fibers[current], &scheduler);
}

// Runs a block, or the blocks of a cluster from blockIdx on. 0, or 1 if all threads wait for each other.
static int run_block(unsigned block_size, unsigned shared, unsigned cluster = 1) {
    constexpr size_t STACK = 1 << 16;
    unsigned threads = block_size * cluster;
    block_threads = block_size, block_shared = shared / 4 + 4;
    std::vector<char> stacks(threads * STACK);
    std::vector<float> memory(block_shared * cluster + 4, NAN);
    emulated_shared = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) & ~uintptr_t(15));
    fibers.assign(threads, {}), over.assign(threads, false);
    warps.assign(threads / 32, {}), blocks.assign(cluster, {}), everybody = {}, idle = 0;
    for (unsigned i = 0; i < threads; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks.data() + i * STACK;
        fibers[i].uc_stack.ss_size = STACK;
        fibers[i].uc_link = nullptr;
        makecontext(&fibers[i], enter, 0);
    }
    unsigned first = blockIdx.x;
    for (unsigned left = threads; left;) {
        left = 0;
        for (current = 0; current < threads; current++) {
            if (over[current]) continue;
            left++;
            threadIdx = {current % block_size, 0, 0};
            blockIdx.x = first + rank_of_fiber();
            swapcontext(&scheduler, &fibers[current]);
        }
        if (++idle > 1000) return 1;
    }
    blockIdx.x = first;
    return 0;
}
