// The y of Mamba-2's scan on Hopper's tensor cores, gated where a gate is given.
//
// A warpgroup (128 threads) walks through one segment of 64 channels of one head, with their state
// (64 x STATES) in registers, in chunks of 64 tokens; the COLUMNS warpgroups of a block share B and
// C. Everything else of a chunk arrives in shared memory while the chunk before it is computed. For
// a chunk:
//
//   scores = C Bᵀ                     tokens that read x tokens that are read
//   y      = C stateᵀ                 both start at once; under them run the scaling of the state
//                                     and Δ·x with its decay to the chunk's end
//   y      = decays·y + (decays·Δ·scores) x
//   state  = decay·state + (Δ·decays·x)ᵀ B     under this: skip, gate, sums of squares, y to memory
//
// Everything in shared memory is bfloat16, in rows of 64 numbers whose pieces of 16 bytes are
// exchanged as the tensor cores want it (swizzle of 128 bytes).
//
//   STATES    64 or 128
//   COLUMNS   warpgroups of a block, each with its own 64 channels: 1, 2 or 3
//   SPLIT     how many warpgroups share the channels of a head
//   HAS_SKIP HAS_INITIAL  0 or 1
//   SKIP_KIND GAIN_KIND  see numbers.cuh
//   HAS_GATE  1: y = (y + D·x) silu(z) gain, and the sums of squares before the gain

#define EXACT 0
#include "../selective_scan/numbers.cuh"

constexpr int CHUNK = 64;
constexpr int ROW = 128;                  // bytes of a row of 64 numbers
constexpr int TILE = CHUNK * ROW;         // bytes of 64 such rows
constexpr int HALVES = STATES / 64;
constexpr int PIECES = 8 * HALVES;        // of 16 bytes, of a token's B or C
constexpr int THREADS = 128 * COLUMNS;
constexpr int STAGE = TILE * (2 * HALVES + (1 + HAS_GATE) * COLUMNS);
constexpr int STATE = 2 * STAGE;          // where the copies of the states begin
constexpr int VECTORS = STATE + TILE * HALVES * COLUMNS;
constexpr int FLOATS = 4 * CHUNK;         // of a warpgroup: see Walk::spread

struct Parameters {
    const void *x, *B, *C, *z, *skip, *gain;
    const float *delta, *sums, *added, *kept, *initial;
    void* y;
    float *squares, *final;
    i64 x_row, x_token, x_head, B_row, B_token, B_group, C_row, C_token, C_group, z_row, z_token,
        z_head;  // strides in bytes
    i64 length;
    int segment, slots, heads, share;
};

// ---- PTX ------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) u8 shared_memory[];

// Places in shared memory are offsets in it; PTX wants addresses.
__device__ __forceinline__ u32 address(u32 place) {
    return static_cast<u32>(__cvta_generic_to_shared(shared_memory)) + place;
}
template <typename T>
__device__ __forceinline__ T read(u32 place) {
    return *reinterpret_cast<const T*>(shared_memory + place);
}
__device__ __forceinline__ void write_float(u32 place, float v) {
    *reinterpret_cast<float*>(shared_memory + place) = v;
}
// 16 bytes, which need not be there before copies_wait(); zeros instead if BYTES are 0.
__device__ __forceinline__ void copy16(u32 place, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(place)), "l"(from),
                 "r"(bytes));
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}
// What threads have written becomes visible to the tensor cores, behind the next barrier.
__device__ __forceinline__ void publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void meet_group(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
// Four matrices of 8 x 8 numbers; a lane gives the place of a row of one of them.
__device__ __forceinline__ void read_turned(u32* r, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row)));
}
__device__ __forceinline__ void read_matrices(u32* r, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row)));
}
__device__ __forceinline__ void write_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(row)),
                 "r"(a), "r"(b), "r"(c), "r"(d));
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;");
}
// Until all but LEFT of the committed products are there.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT));
}
// The compiler must not use them earlier, nor change them later, than where this stands.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]));
}

#define D8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(d) D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24)
#define N32                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "  \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

// d (+)= a b of 64 x 16 and 16 x 64; rows of a and columns of b lie along memory.
__device__ __forceinline__ void multiply_tiles(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " N32
        ", %32, %33, p, 1, 1, 0, 0;\n}\n"
        : D32(d)
        : "l"(a), "l"(b), "r"(add));
}
// d (+)= a b of 64 x 16 (in registers) and 16 x 64; rows of b lie along memory.
__device__ __forceinline__ void multiply_turned(float (&d)[32], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " N32
        ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
        : D32(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// The same for 16 x 128 numbers of b.
__device__ __forceinline__ void multiply_turned(float (&d)[64], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : D32(d), D8(d, 32), D8(d, 40), D8(d, 48), D8(d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// ---- places ---------------------------------------------------------------------------------------

// Of a piece of 16 bytes in a tile of rows of 128.
__device__ __forceinline__ u32 spot(int row, int piece) {
    return row * ROW + ((piece ^ (row & 7)) << 4);
}

// How the tensor cores find a tile: 8 rows are 1,024 bytes, tiles side by side are TILE bytes apart.
__device__ __forceinline__ u64 described(u32 tile) {
    return static_cast<u64>((address(tile) & 0x3ffff) >> 4) | static_cast<u64>(TILE >> 4) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <int N>
__device__ __forceinline__ void scale(float (&d)[N], float by) {
#pragma unroll
    for (int i = 0; i < N; i++) d[i] *= by;
}

// Two numbers that lie side by side, the first at an even place.
template <int KIND>
__device__ __forceinline__ float2 pair_at(const void* base, i64 index) {
    if (KIND == 0) return static_cast<const float2*>(base)[index / 2];
    u32 pair = static_cast<const u32*>(base)[index / 2];
    return make_float2(widen<KIND>(pair & 0xffff), widen<KIND>(pair >> 16));
}

// ---- a block --------------------------------------------------------------------------------------

struct Walk {
    const Parameters& p;
    int thread, group, warp, lane;  // thread and warp of the warpgroup
    i64 row, head;
    int channel, slot, count;       // first channel of the head; tokens of the segment
    const u8 *x, *z, *B, *C;        // the next piece of each that this thread fetches
    u8* y;                          // and writes
    const float *delta, *sums;
    float sum_next, delta_next, total_next;

    __device__ __forceinline__ Walk(const Parameters& q) : p(q) {
        thread = threadIdx.x % 128, group = threadIdx.x / 128;
        warp = thread / 32, lane = thread % 32;
        int column = blockIdx.x * COLUMNS + group;
        head = column / SPLIT, channel = column % SPLIT * 64;
        slot = blockIdx.y, row = blockIdx.z;
        i64 begin = static_cast<i64>(slot) * p.segment;
        i64 left = p.length - begin;
        count = left < p.segment ? static_cast<int>(left) : p.segment;
        i64 of = blockIdx.x * COLUMNS / SPLIT / p.share;
        int t = thread / 8, piece = thread % 8 * 16 + 2 * channel;
        x = static_cast<const u8*>(p.x) + row * p.x_row + head * p.x_head + (begin + t) * p.x_token + piece;
        if (HAS_GATE)
            z = static_cast<const u8*>(p.z) + row * p.z_row + head * p.z_head + (begin + t) * p.z_token + piece;
        t = threadIdx.x / PIECES, piece = threadIdx.x % PIECES * 16;
        B = static_cast<const u8*>(p.B) + row * p.B_row + of * p.B_group + (begin + t) * p.B_token + piece;
        C = static_cast<const u8*>(p.C) + row * p.C_row + of * p.C_group + (begin + t) * p.C_token + piece;
        t = 16 * warp + lane / 8;
        y = static_cast<u8*>(p.y) + ((row * p.length + begin + t) * p.heads + head) * (SPLIT * ROW) +
            lane % 8 * 16 + 2 * channel;
        delta = p.delta + (row * p.heads + head) * p.length + begin;
        sums = p.sums + (row * p.heads + head) * p.length + begin;
    }
    __device__ __forceinline__ u32 b_tile(int stage) const { return stage * STAGE; }
    __device__ __forceinline__ u32 c_tile(int stage) const { return b_tile(stage) + TILE * HALVES; }
    __device__ __forceinline__ u32 x_tile(int stage) const {
        return b_tile(stage) + TILE * (2 * HALVES + group);
    }
    __device__ __forceinline__ u32 z_tile(int stage) const { return x_tile(stage) + TILE * COLUMNS; }
    __device__ __forceinline__ u32 state_tile() const { return STATE + TILE * HALVES * group; }
    __device__ __forceinline__ u32 vector(int which) const {
        return VECTORS + 4 * (FLOATS * group + CHUNK * which);
    }

    // Of a tile of tokens and so many pieces each, in turns of STEP threads; zeros behind the last
    // token. The thread's piece moves on to the next chunk.
    template <bool WHOLE, int WIDE, int STEP>
    __device__ __forceinline__ void fetch_tile(u32 to, const u8*& from, i64 token, int self, int left) {
        constexpr int ROWS = STEP / WIDE;  // a multiple of 8: pieces stay where they are in a row
        static_assert(STEP % WIDE == 0 && ROWS % 8 == 0, "turns do not fit");
        int t = self / WIDE, piece = self % WIDE;
        to += TILE * (piece / 8) + spot(t, piece % 8);
        const u8* next = from;
#pragma unroll
        for (int turn = 0; turn < (CHUNK + ROWS - 1) / ROWS; turn++, t += ROWS) {
            if (CHUNK % ROWS != 0 && t >= CHUNK) break;
            copy16(to + turn * ROWS * ROW, next, WHOLE || t < left ? 16 : 0);
            next += ROWS * token;
        }
        from += CHUNK * token;
    }
    template <bool WHOLE>
    __device__ __forceinline__ void fetch_tiles(int stage, int left) {
        fetch_tile<WHOLE, PIECES, THREADS>(b_tile(stage), B, p.B_token, threadIdx.x, left);
        fetch_tile<WHOLE, PIECES, THREADS>(c_tile(stage), C, p.C_token, threadIdx.x, left);
        fetch_tile<WHOLE, 8, 128>(x_tile(stage), x, p.x_token, thread, left);
        if (HAS_GATE) fetch_tile<WHOLE, 8, 128>(z_tile(stage), z, p.z_token, thread, left);
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
    // The fetched vectors, where the whole warpgroup reads them: sums; Δ; Δ with the decay to the end
    // of the chunk; Δ with the decay to the end of 16 tokens.
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
        return ((number * p.heads + head) * SPLIT * 64 + channel + my_row()) * STATES + 8 * q + my_column();
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
            *reinterpret_cast<float2*>(at + 8 * STATES) = make_float2(last[4 * q + 2], last[4 * q + 3]);
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
#pragma unroll
        for (int k = 0; k < 4; k++) {
            // Matrices: tokens 16 k and up, channels 16 warp and up; then 8 channels further; then
            // both 8 tokens further.
            int t = 16 * k + lane % 8 + lane / 16 * 8;
            read_turned(written + 4 * k, x_tile(stage) + spot(t, 2 * warp + lane / 8 % 2));
        }
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
            if (h == 0) d.own[0] = exp2_fast(upper - s.x) * w.x, d.own[1] = exp2_fast(upper - s.y) * w.y;
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
                to[0] = pack_bfloat16(first ? v[0] * d.own[0] : 0.0f, second ? v[1] * d.own[1] : 0.0f);
                to[1] = pack_bfloat16(v[2] * d.own[2], v[3] * d.own[3]);
                to[3] = pack_bfloat16(first ? v[6] * d.own[4] : 0.0f, second ? v[7] * d.own[5] : 0.0f);
            }
        }
    }
    // The warp's own rows of a tile, in the order of products.
    __device__ __forceinline__ void read_rows(u32 (&pairs)[16], u32 tile) const {
#pragma unroll
        for (int q = 0; q < 8; q += 2) read_matrices(pairs + 2 * q, tile + corner(q));
    }
    static __device__ __forceinline__ void add_skip(float (&y)[32], const u32 (&x)[16], float skip) {
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
    __device__ __forceinline__ void gate(float (&y)[32], const u32 (&z)[16], const float2 (&gain)[8],
                                         int first) const {
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
            i64 at = token * p.heads * SPLIT + blockIdx.x * COLUMNS + group;
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
// d (+)= a b of a matrix in registers and a tile, over the chunk's tokens.
template <int N>
__device__ __forceinline__ void multiply_by_tokens(float (&d)[N], const u32 (&a)[16], u64 b, bool add) {
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_turned(d, a + 4 * k, b + (k * 16 * ROW >> 4), add || k > 0);
    products_commit();
}

template <int WARP>
__device__ __forceinline__ void weigh_scores(const Walk& walk, Walk::Decays& decays, u32 (&weights)[16],
                                             float (&scores)[32]) {
    walk.find<WARP>(decays);
    products_wait<2>();
    pin(scores);
    walk.apply<WARP>(weights, scores, decays);
}

// Starts y as C stateᵀ, and the state behind the chunk; the scores become what the chunk itself adds to y.
__device__ __forceinline__ void multiply(const Walk& walk, int stage, float (&y)[32], float (&scores)[32],
                                         Walk::State& state, Walk::Decays& decays) {
    u32 written[16], weights[16];
    u64 b = described(walk.b_tile(stage)), c = described(walk.c_tile(stage));
    pin(scores), pin(y);
    products_begin();
    multiply_by_states(scores, c, b);
    multiply_by_states(y, c, described(walk.state_tile()));
    walk.weigh(written, stage);
    pin(state);
    products_begin();
    multiply_by_tokens(state, written, b, true);
    switch (walk.warp) {
        case 0: weigh_scores<0>(walk, decays, weights, scores); break;
        case 1: weigh_scores<1>(walk, decays, weights, scores); break;
        case 2: weigh_scores<2>(walk, decays, weights, scores); break;
        default: weigh_scores<3>(walk, decays, weights, scores);
    }
    pin(scores);
    products_begin();
    multiply_by_tokens(scores, weights, described(walk.x_tile(stage)), false);
}

// A chunk of tokens. The state comes in with the decay over this chunk, and goes on with that over the
// next; the next chunk's numbers come in under it.
__device__ __forceinline__ void step(Walk& walk, Walk::State& state, int stage, int first, float skip) {
    float scores[32], y[32];
    Walk::Decays decays;
    multiply(walk, stage, y, scores, state, decays);
    products_wait<1>();
    pin(state), pin(y);
    meet_group(walk.group);  // nobody reads the last state any more
    walk.store_tile(walk.state_tile(), state);
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
    if (!HAS_GATE) meet_group(walk.group);  // nobody reads x any more
    walk.store_y(y, HAS_GATE ? walk.z_tile(stage) : walk.x_tile(stage), first);
}

extern "C" __global__ void __launch_bounds__(THREADS, COLUMNS == 1 ? 2 : 1)
    ssd_outputs(const __grid_constant__ Parameters p) {
    Walk walk(p);
    Walk::State state;
    float skip = HAS_SKIP ? number_at<SKIP_KIND>(p.skip, walk.head) : 0.0f;
    walk.fetch(0, 0);
    walk.begin(state);
    walk.store_tile(walk.state_tile(), state);
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
