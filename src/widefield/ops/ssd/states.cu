// What a segment adds to the state of a head in Mamba-2's scan, on Hopper's tensor cores, as exact
// as float32: Δ·decay·x goes into it as three parts of bfloat16.
//
// A block is a warpgroup (128 threads) and has 64 channels of a head. It walks from the last chunk
// of 64 tokens to the first, so that every token's decay is one power of the sum of all logarithms
// behind it. Where that is below 2^-150 nothing is added, but what is not finite is still found.
//
//   STATES    64 or 128
//   SPLIT     how many blocks share the channels of a head
//   X_TOKEN B_TOKEN  bytes from token to token: known here, they cost nothing

#define EXACT 0
#include "../selective_scan/numbers.cuh"
#include "tiles.cuh"

constexpr float LEAST = -150.0f;
constexpr int STAGE = TILE * (HALVES + 1);
constexpr int VECTORS = 2 * STAGE;  // where the weights of a chunk's tokens are

struct Parameters {
    const void *x, *B;
    const float *delta, *sums, *rests;
    float *added, *kept;
    i64 x_row, x_head, B_row, B_group;  // strides in bytes
    i64 length;
    int segment, slots, heads, share;
};

struct Walk {
    const Parameters& p;
    int thread, warp, lane;
    i64 row, head;
    int channel, slot, count;                   // first channel of the head; tokens of the segment
    const u8 *x, *B;                            // the next piece of each that this thread fetches
    i64 vectors;                                // where Δ and sums of the segment begin
    float delta, sum, rest, total, total_rest;  // of the chunk that was fetched last

    __device__ __forceinline__ Walk(const Parameters& q) : p(q) {
        thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
        head = blockIdx.x / SPLIT, channel = blockIdx.x % SPLIT * 64;
        slot = blockIdx.y, row = blockIdx.z;
        i64 begin = static_cast<i64>(slot) * p.segment;
        i64 left = p.length - begin;
        count = left < p.segment ? static_cast<int>(left) : p.segment;
        vectors = (row * p.heads + head) * p.length + begin;
        begin += (count - 1) / CHUNK * CHUNK;
        x = static_cast<const u8*>(p.x) + row * p.x_row + head * p.x_head +
            (begin + thread / 8) * X_TOKEN + 2 * channel + thread % 8 * 16;
        B = static_cast<const u8*>(p.B) + row * p.B_row + head / p.share * p.B_group +
            (begin + thread / PIECES) * B_TOKEN + thread % PIECES * 16;
    }
    __device__ __forceinline__ u32 b_tile(int stage) const { return stage * STAGE; }
    __device__ __forceinline__ u32 x_tile(int stage) const { return b_tile(stage) + TILE * HALVES; }

    template <bool WHOLE>
    __device__ __forceinline__ void fetch_tiles(int stage, int left) {
        fetch_tile<WHOLE, PIECES, 128, B_TOKEN>(b_tile(stage), B, thread, left);
        fetch_tile<WHOLE, 8, 128, X_TOKEN>(x_tile(stage), x, thread, left);
    }
    // What a chunk needs, into a stage and registers.
    __device__ __forceinline__ void fetch(int first, int stage) {
        if (first >= 0) {
            int left = min(count - first, CHUNK);
            if (left == CHUNK)
                fetch_tiles<true>(stage, left);
            else
                fetch_tiles<false>(stage, left);
            x -= 2ll * CHUNK * X_TOKEN, B -= 2ll * CHUNK * B_TOKEN;
            i64 at = vectors + first;
            delta = sum = rest = 0.0f;
            if (thread < left)
                delta = p.delta[at + thread], sum = p.sums[at + thread],
                rest = p.rests[at + thread];
            total = p.sums[at + left - 1], total_rest = p.rests[at + left - 1];
        }
        copies_commit();
    }
    __device__ __forceinline__ u32 weights(int stage) const { return VECTORS + 4 * CHUNK * stage; }

    // Starts to add (weights·x)ᵀ B, in three parts; 16 tokens at a time.
    __device__ __forceinline__ void add(float (&state)[32 * HALVES], int stage) const {
        u32 pairs[16];
        read_channels(pairs, x_tile(stage), warp, lane);
        u64 b = described(b_tile(stage));
        pin(state);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 upper[4], middle[4], lower[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int t = 16 * k + i / 2 * 8 + lane % 4 * 2;
                float2 w = read<float2>(weights(stage) + 4 * t);
                u32 pair = pairs[4 * k + i];
                split(low(pair) * w.x, high(pair) * w.y, upper[i], middle[i], lower[i]);
            }
            u64 tokens = b + (k * 16 * ROW >> 4);
            products_begin();
            multiply_turned(state, lower, tokens, 1);
            multiply_turned(state, middle, tokens, 1);
            multiply_turned(state, upper, tokens, 1);
        }
        products_commit();
    }
    // Two numbers as pairs of their first, second and third 8 bits.
    static __device__ __forceinline__ void split(float a, float b, u32& upper, u32& middle,
                                                 u32& lower) {
        float c = first_bits(a), d = first_bits(b);
        upper = pack_bfloat16(c, d);
        a -= c, b -= d, c = first_bits(a), d = first_bits(b);
        middle = pack_bfloat16(c, d);
        lower = pack_bfloat16(a - c, b - d);
    }
    static __device__ __forceinline__ float first_bits(float v) {
        return __uint_as_float(__float_as_uint(v) & 0xffff0000u);
    }
    // NaN if anything in the tiles is not finite, else 0: what this thread finds.
    __device__ __forceinline__ float spoilt(int stage) const {
        bool found = false;
#pragma unroll
        for (int i = 0; i < STAGE / (16 * 128); i++) {
            uint4 v = read<uint4>(stage * STAGE + 16 * (128 * i + thread));
            found =
                found || not_finite(v.x) || not_finite(v.y) || not_finite(v.z) || not_finite(v.w);
        }
        return found ? __uint_as_float(0x7fffffffu) : 0.0f;
    }
    static __device__ __forceinline__ bool not_finite(u32 pair) {
        return (pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u;
    }
    // What any thread has found.
    __device__ __forceinline__ float together(float poison) const {
        __syncthreads();
#pragma unroll
        for (int i = 16; i; i /= 2) poison += __shfl_xor_sync(~0u, poison, i);
        if (lane == 0) write_float(VECTORS + 4 * warp, poison);
        __syncthreads();
        float2 a = read<float2>(VECTORS), b = read<float2>(VECTORS + 8);
        return a.x + a.y + b.x + b.y;
    }
    __device__ __forceinline__ void store(const float (&state)[32 * HALVES], float poison,
                                          float since) {
        i64 segment = (row * p.slots + slot) * p.heads + head;
        float* to = p.added + (segment * SPLIT * 64 + channel + 16 * warp + lane / 4) * STATES +
                    lane % 4 * 2;
#pragma unroll
        for (int q = 0; q < 8 * HALVES; q++) {
            const float* v = state + 4 * q;
            *reinterpret_cast<float2*>(to + 8 * q) = make_float2(v[0] + poison, v[1] + poison);
            *reinterpret_cast<float2*>(to + 8 * q + 8 * STATES) =
                make_float2(v[2] + poison, v[3] + poison);
        }
        if (thread == 0 && channel == 0) p.kept[segment] = exp2_fast(since);
    }
};

extern "C" __global__ void __launch_bounds__(128, 3)
    ssd_states(const __grid_constant__ Parameters p) {
    Walk walk(p);
    float state[32 * HALVES];
#pragma unroll
    for (int i = 0; i < 32 * HALVES; i++) state[i] = 0.0f;
    float poison = 0.0f, since = 0.0f;  // the sum of all logarithms behind the chunk
    int first = (walk.count - 1) / CHUNK * CHUNK;
    walk.fetch(first, 0);
    for (int stage = 0; first >= 0; first -= CHUNK, stage ^= 1) {
        float ahead = (walk.total - walk.sum) + (walk.total_rest - walk.rest) + since;
        bool alive = !(since < LEAST);
        if (walk.thread < CHUNK)
            write_float(walk.weights(stage) + 4 * walk.thread, walk.delta * exp2_fast(ahead));
        since += walk.total + walk.total_rest;
        copies_wait();
        publish();
        products_wait<0>();
        pin(state);
        __syncthreads();
        walk.fetch(first - CHUNK, stage ^ 1);
        if (alive)
            walk.add(state, stage);
        else
            poison += walk.spoilt(stage);
    }
    products_wait<0>();
    pin(state);
    walk.store(state, walk.together(poison), since);
}
