// The y of Mamba-2's scan on Hopper's tensor cores, gated where a gate is given.
//
// A block is a warpgroup (128 threads) and walks through one segment of 64 channels of one head,
// with their state (64 x STATES) in registers, in chunks of 64 tokens. What a chunk needs arrives
// in shared memory while the chunk before it is computed. For a chunk:
//
//   scores = C Bᵀ              tokens that read x tokens that are read
//   y      = C stateᵀ          of the state in front of the chunk
//   state  = decay·state + (Δ·decays·x)ᵀ B
//   own    = (decays·Δ·scores) x
//   y      = decays·y + own, with skip and gate
//
// Products go on while the numbers for the next one are made.
//
//   STATES    64 or 128
//   SPLIT     how many blocks share the channels of a head
//   HAS_SKIP HAS_INITIAL  0 or 1
//   X_TOKEN B_TOKEN C_TOKEN Z_TOKEN  bytes from token to token: known here, they cost nothing
//   SKIP_KIND GAIN_KIND  see numbers.cuh
//   HAS_GATE  1: y = (y + D·x) silu(z) gain, and the sums of squares before the gain

#define EXACT 0
#include "../selective_scan/numbers.cuh"
#include "tiles.cuh"

constexpr int STAGE = TILE * (2 * HALVES + 1 + HAS_GATE);
constexpr int STATE = 2 * STAGE;                // where the copy of the state is
constexpr int VECTORS = STATE + TILE * HALVES;  // see Walk::spread

struct Parameters {
    const void *x, *B, *C, *z, *skip, *gain;
    const float *delta, *sums, *added, *kept, *initial;
    void* y;
    float *squares, *final;
    i64 x_row, x_head, B_row, B_group, C_row, C_group, z_row, z_head;  // strides in bytes
    i64 length;
    int segment, slots, heads, share;
};

// Two numbers that lie side by side, the first at an even place.
template <int KIND>
__device__ __forceinline__ float2 pair_at(const void* base, i64 index) {
    if (KIND == 0) return static_cast<const float2*>(base)[index / 2];
    u32 pair = static_cast<const u32*>(base)[index / 2];
    return make_float2(widen<KIND>(pair & 0xffff), widen<KIND>(pair >> 16));
}

struct Walk {
    const Parameters& p;
    int thread, warp, lane;
    i64 row, head;
    int channel, slot, count;  // first channel of the head; tokens of the segment
    const u8 *x, *z, *B, *C;   // the next piece of each that this thread fetches
    u8* y;                     // and writes
    const float *delta, *sums;
    float sum_next, delta_next, total_next;

    __device__ __forceinline__ Walk(const Parameters& q) : p(q) {
        thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
        head = blockIdx.x / SPLIT, channel = blockIdx.x % SPLIT * 64;
        slot = blockIdx.y, row = blockIdx.z;
        i64 begin = static_cast<i64>(slot) * p.segment;
        i64 left = p.length - begin;
        count = left < p.segment ? static_cast<int>(left) : p.segment;
        i64 of = head / p.share;
        int t = thread / 8, piece = thread % 8 * 16 + 2 * channel;
        x = static_cast<const u8*>(p.x) + row * p.x_row + head * p.x_head + (begin + t) * X_TOKEN +
            piece;
        if (HAS_GATE)
            z = static_cast<const u8*>(p.z) + row * p.z_row + head * p.z_head +
                (begin + t) * Z_TOKEN + piece;
        t = thread / PIECES, piece = thread % PIECES * 16;
        B = static_cast<const u8*>(p.B) + row * p.B_row + of * p.B_group + (begin + t) * B_TOKEN +
            piece;
        C = static_cast<const u8*>(p.C) + row * p.C_row + of * p.C_group + (begin + t) * C_TOKEN +
            piece;
        t = 16 * warp + lane / 8;
        y = static_cast<u8*>(p.y) +
            ((row * p.length + begin + t) * p.heads + head) * (SPLIT * ROW) + lane % 8 * 16 +
            2 * channel;
        delta = p.delta + (row * p.heads + head) * p.length + begin;
        sums = p.sums + (row * p.heads + head) * p.length + begin;
    }
    __device__ __forceinline__ u32 b_tile(int stage) const { return stage * STAGE; }
    __device__ __forceinline__ u32 c_tile(int stage) const { return b_tile(stage) + TILE * HALVES; }
    __device__ __forceinline__ u32 x_tile(int stage) const {
        return b_tile(stage) + TILE * 2 * HALVES;
    }
    __device__ __forceinline__ u32 z_tile(int stage) const { return x_tile(stage) + TILE; }
    __device__ __forceinline__ u32 vector(int which) const { return VECTORS + 4 * CHUNK * which; }

    template <bool WHOLE>
    __device__ __forceinline__ void fetch_tiles(int stage, int left) {
        fetch_tile<WHOLE, PIECES, 128, B_TOKEN>(b_tile(stage), B, thread, left);
        fetch_tile<WHOLE, PIECES, 128, C_TOKEN>(c_tile(stage), C, thread, left);
        fetch_tile<WHOLE, 8, 128, X_TOKEN>(x_tile(stage), x, thread, left);
        if (HAS_GATE) fetch_tile<WHOLE, 8, 128, Z_TOKEN>(z_tile(stage), z, thread, left);
    }
    // What a chunk needs, into a stage; its vectors into registers.
    __device__ __forceinline__ void fetch(int first, int stage) {
        int left = count - first;
        if (left > 0) {
            if (left >= CHUNK)
                fetch_tiles<true>(stage, left);
            else
                fetch_tiles<false>(stage, left);
            bool inside = thread < left && thread < CHUNK;
            sum_next = inside ? sums[first + thread] : 0.0f;
            delta_next = inside ? delta[first + thread] : 0.0f;
            total_next = sums[first + min(left, CHUNK) - 1];
        }
        copies_commit();
    }
    // The fetched vectors, where all threads read them: sums; Δ; Δ with the decay to the
    // end of the chunk; Δ with the decay to the end of 16 tokens.
    __device__ __forceinline__ void spread() const {
        float near = __shfl_sync(~0u, sum_next, lane | 15);
        if (thread < CHUNK) {
            write_float(vector(0) + 4 * thread, sum_next);
            write_float(vector(1) + 4 * thread, delta_next);
            write_float(vector(2) + 4 * thread, delta_next * exp2_fast(total_next - sum_next));
            write_float(vector(3) + 4 * thread, delta_next * exp2_fast(near - sum_next));
        }
    }
    // A lane's rows of any product are 16 warp + lane / 4 and 8 further, its columns 8 q and up.
    __device__ __forceinline__ int my_row() const { return 16 * warp + lane / 4; }
    __device__ __forceinline__ int my_column() const { return lane % 4 * 2; }

    // What lies at a lane's places in 64 x STATES numbers of the head.
    using State = float[32 * HALVES];
    __device__ __forceinline__ i64 state_at(i64 number, int q) const {
        return ((number * p.heads + head) * SPLIT * 64 + channel + my_row()) * STATES + 8 * q +
               my_column();
    }
    __device__ __forceinline__ void add_state(State& state, const float* from, i64 number) const {
#pragma unroll
        for (int q = 0; q < 8 * HALVES; q++) {
            const float* at = from + state_at(number, q);
            float2 upper = *reinterpret_cast<const float2*>(at);
            float2 lower = *reinterpret_cast<const float2*>(at + 8 * STATES);
            state[4 * q] += upper.x, state[4 * q + 1] += upper.y;
            state[4 * q + 2] += lower.x, state[4 * q + 3] += lower.y;
        }
    }
    __device__ __forceinline__ void pass(State& state, int over) const {
        i64 segment = row * p.slots + over;
        scale(state, p.kept[segment * p.heads + head]);
        add_state(state, p.added, segment);
    }
    // The state in front of the segment, from what each one before it adds; behind the last of them
    // the final state goes to memory.
    __device__ __forceinline__ void begin(State& state) const {
#pragma unroll
        for (int i = 0; i < 32 * HALVES; i++) state[i] = 0.0f;
        if (HAS_INITIAL) add_state(state, p.initial, row);
        for (int before = 0; before < slot; before++) pass(state, before);
        if (slot < p.slots - 1) return;
        State last;
#pragma unroll
        for (int i = 0; i < 32 * HALVES; i++) last[i] = state[i];
        pass(last, slot);
#pragma unroll
        for (int q = 0; q < 8 * HALVES; q++) {
            float* at = p.final + state_at(row, q);
            *reinterpret_cast<float2*>(at) = make_float2(last[4 * q], last[4 * q + 1]);
            *reinterpret_cast<float2*>(at + 8 * STATES) =
                make_float2(last[4 * q + 2], last[4 * q + 3]);
        }
    }
    // Where a lane writes its part of four matrices: 16 rows of its warp, pieces q and q + 1.
    __device__ __forceinline__ u32 corner(int q) const {
        return spot(16 * warp + lane % 16, lane / 16) ^ q << 4;  // q is even
    }
    template <int N>
    __device__ __forceinline__ void store_tile(u32 to, const float (&d)[N]) const {
#pragma unroll
        for (int q = 0; q < N / 4; q += 2) {
            const float* v = d + 4 * q;
            write_matrices(to + TILE * (q / 8) + corner(q % 8), pack_bfloat16(v[0], v[1]),
                           pack_bfloat16(v[2], v[3]), pack_bfloat16(v[4], v[5]),
                           pack_bfloat16(v[6], v[7]));
        }
    }
    // Δ·x with its decay to the chunk's end, turned: channels x tokens, as products read it.
    __device__ __forceinline__ void weigh(u32 (&written)[16], int stage) const {
        read_channels(written, x_tile(stage), warp, lane);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float2 w = read<float2>(vector(2) + 4 * (16 * (i / 4) + i % 4 / 2 * 8 + my_column()));
            written[i] = pack_bfloat16(low(written[i]) * w.x, high(written[i]) * w.y);
        }
    }
    // What the scores are multiplied with: Δ and decays. From 16 tokens to later ones the decay is
    // that to the end of the 16 times that from there.
    struct Decays {
        float early[4][8];  // from the 16 tokens before the warp's own, in the order of the scores
        float own[6];       // among its own, without those that are never read
        float fall[2];      // from the chunk's start to the lane's two rows
    };
    template <int WARP>
    __device__ __forceinline__ void find(Decays& d) const {
        float upper = read<float>(vector(0) + 4 * my_row());
        float lower = read<float>(vector(0) + 4 * my_row() + 32);
#pragma unroll
        for (int k = 0; k < WARP; k++) {
            float end = read<float>(vector(0) + 4 * (16 * k + 15));
            float above = exp2_fast(upper - end), below = exp2_fast(lower - end);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float2 w = read<float2>(vector(3) + 4 * (16 * k + 8 * h + my_column()));
                d.early[k][4 * h] = above * w.x, d.early[k][4 * h + 1] = above * w.y;
                d.early[k][4 * h + 2] = below * w.x, d.early[k][4 * h + 3] = below * w.y;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int j = 4 * (16 * WARP + 8 * h + my_column());
            float2 s = read<float2>(vector(0) + j), w = read<float2>(vector(1) + j);
            if (h == 0)
                d.own[0] = exp2_fast(upper - s.x) * w.x, d.own[1] = exp2_fast(upper - s.y) * w.y;
            d.own[2 + 2 * h] = exp2_fast(lower - s.x) * w.x;
            d.own[3 + 2 * h] = exp2_fast(lower - s.y) * w.y;
        }
        d.fall[0] = exp2_fast(upper), d.fall[1] = exp2_fast(lower);
    }
    // The scores become what multiplies x; 0 for tokens that come later.
    template <int WARP>
    __device__ __forceinline__ void apply(u32 (&weights)[16], const float (&scores)[32],
                                          const Decays& d) const {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32* to = weights + 4 * k;
            const float* v = scores + 8 * k;
#pragma unroll
            for (int i = 0; i < 4; i++)
                to[i] = k < WARP ? pack_bfloat16(v[2 * i] * d.early[k % 4][2 * i],
                                                 v[2 * i + 1] * d.early[k % 4][2 * i + 1])
                                 : 0;
            if (k == WARP) {
                bool first = my_column() <= lane / 4, second = my_column() < lane / 4;
                to[0] =
                    pack_bfloat16(first ? v[0] * d.own[0] : 0.0f, second ? v[1] * d.own[1] : 0.0f);
                to[1] = pack_bfloat16(v[2] * d.own[2], v[3] * d.own[3]);
                to[3] =
                    pack_bfloat16(first ? v[6] * d.own[4] : 0.0f, second ? v[7] * d.own[5] : 0.0f);
            }
        }
    }
    // The warp's own rows of a tile, in the order of products.
    __device__ __forceinline__ void read_rows(u32 (&pairs)[16], u32 tile) const {
#pragma unroll
        for (int q = 0; q < 8; q += 2) read_matrices(pairs + 2 * q, tile + corner(q));
    }
    static __device__ __forceinline__ void add_skip(float (&y)[32], const u32 (&x)[16],
                                                    float skip) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            y[2 * i] = fmaf(low(x[i]), skip, y[2 * i]);
            y[2 * i + 1] = fmaf(high(x[i]), skip, y[2 * i + 1]);
        }
    }
    __device__ __forceinline__ void read_gain(float2 (&gain)[8]) const {
        i64 at = head * SPLIT * 64 + channel + my_column();
#pragma unroll
        for (int q = 0; q < 8; q++) gain[q] = pair_at<GAIN_KIND>(p.gain, at + 8 * q);
    }
    static __device__ __forceinline__ float gated(float y, float z) {
        return y * (z * reciprocal(1.0f + exp2_fast(-LOG2E * z)));
    }
    // Behind the gate, times the gain; and the sums of squares before that.
    __device__ __forceinline__ void gate(float (&y)[32], const u32 (&z)[16],
                                         const float2 (&gain)[8], int first) const {
        float square[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float a = gated(y[2 * i], low(z[i])), b = gated(y[2 * i + 1], high(z[i]));
            square[i % 2] = fmaf(a, a, fmaf(b, b, square[i % 2]));
            y[2 * i] = a * gain[i / 2].x, y[2 * i + 1] = b * gain[i / 2].y;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            square[h] += __shfl_xor_sync(~0u, square[h], 1);
            square[h] += __shfl_xor_sync(~0u, square[h], 2);
            int t = first + my_row() + 8 * h;
            i64 token = row * p.length + static_cast<i64>(slot) * p.segment + t;
            i64 at = token * p.heads * SPLIT + blockIdx.x;
            if (lane % 4 == 0 && t < count) p.squares[at] = square[h];
        }
    }
    // Through the warp's own rows of a tile, so that whole rows go to memory.
    __device__ __forceinline__ void store_y(const float (&values)[32], u32 tile, int first) {
        __syncwarp();
        store_tile(tile, values);
        __syncwarp();
        int t = 16 * warp + lane / 8;
        uint4 piece[4];
#pragma unroll
        for (int i = 0; i < 4; i++) piece[i] = read<uint4>(tile + spot(t + 4 * i, lane % 8));
        i64 token = static_cast<i64>(p.heads) * (SPLIT * ROW);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + t + 4 * i < count) *reinterpret_cast<uint4*>(y + 4 * i * token) = piece[i];
        y += CHUNK * token;
    }
};

// d = a bᵀ of two tiles, over all states; as a group of products.
__device__ __forceinline__ void multiply_by_states(float (&d)[32], u64 a, u64 b) {
#pragma unroll
    for (int k = 0; k < 4 * HALVES; k++) {
        int further = (k / 4 * TILE + k % 4 * 32) >> 4;
        multiply_tiles(d, a + further, b + further, k > 0);
    }
    products_commit();
}
template <int WARP>
__device__ __forceinline__ void weigh_scores(const Walk& walk, Walk::Decays& decays,
                                             u32 (&weights)[16], float (&scores)[32]) {
    walk.find<WARP>(decays);
    products_wait<2>();
    pin(scores);
    walk.apply<WARP>(weights, scores, decays);
}

// Starts y as C stateᵀ, and the state behind the chunk; the scores become what the chunk itself
// adds to y.
__device__ __forceinline__ void multiply(const Walk& walk, int stage, float (&y)[32],
                                         float (&scores)[32], Walk::State& state,
                                         Walk::Decays& decays) {
    u32 written[16], weights[16];
    u64 b = described(walk.b_tile(stage)), c = described(walk.c_tile(stage));
    pin(scores), pin(y);
    products_begin();
    multiply_by_states(scores, c, b);
    multiply_by_states(y, c, described(STATE));
    walk.weigh(written, stage);
    pin(state);
    products_begin();
    multiply_by_tokens(state, written, b, true);
    switch (walk.warp) {
        case 0:
            weigh_scores<0>(walk, decays, weights, scores);
            break;
        case 1:
            weigh_scores<1>(walk, decays, weights, scores);
            break;
        case 2:
            weigh_scores<2>(walk, decays, weights, scores);
            break;
        default:
            weigh_scores<3>(walk, decays, weights, scores);
    }
    pin(scores);
    products_begin();
    multiply_by_tokens(scores, weights, described(walk.x_tile(stage)), false);
}

// A chunk of tokens. The state comes in with the decay over this chunk, and goes on with that over
// the next; the next chunk's numbers come in under it.
__device__ __forceinline__ void step(Walk& walk, Walk::State& state, int stage, int first,
                                     float skip) {
    float scores[32], y[32];
    Walk::Decays decays;
    multiply(walk, stage, y, scores, state, decays);
    products_wait<1>();
    pin(state), pin(y);
    __syncthreads();  // nobody reads the last state any more
    walk.store_tile(STATE, state);
    scale(state, exp2_fast(walk.total_next));
    u32 x[16], z[16];
    float2 gain[8];
    if (HAS_SKIP) walk.read_rows(x, walk.x_tile(stage));
    if (HAS_GATE) walk.read_rows(z, walk.z_tile(stage)), walk.read_gain(gain);
    products_wait<0>();
    pin(scores);
#pragma unroll
    for (int i = 0; i < 32; i++) y[i] = fmaf(y[i], decays.fall[i / 2 % 2], scores[i]);
    if (HAS_SKIP) walk.add_skip(y, x, skip);
    if (HAS_GATE) walk.gate(y, z, gain, first);
    if (!HAS_GATE) __syncthreads();  // nobody reads x any more
    walk.store_y(y, HAS_GATE ? walk.z_tile(stage) : walk.x_tile(stage), first);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    ssd_outputs(const __grid_constant__ Parameters p) {
    Walk walk(p);
    Walk::State state;
    float skip = HAS_SKIP ? number_at<SKIP_KIND>(p.skip, walk.head) : 0.0f;
    walk.fetch(0, 0);
    walk.begin(state);
    walk.store_tile(STATE, state);
    scale(state, exp2_fast(walk.total_next));
    for (int first = 0, stage = 0; first < walk.count; first += CHUNK, stage ^= 1) {
        copies_wait();
        walk.spread();
        publish();
        __syncthreads();
        walk.fetch(first + CHUNK, stage ^ 1);
        step(walk, state, stage, first, skip);
    }
}
