// The selective scan for many rows, forward and backward, compiled at run time for one set of the
// macros below.
//
// A lane walks through PER_LANE channels of one row, a warp through 32 times as many that lie side
// by side. It takes TILE tokens at a time: their Δ and Δ·x are in registers, and for one state
// after the other all of the tile's tokens are advanced. States and rates lie in shared memory, in
// columns of which each lane only touches its own; B and C of a tile lie there as [state][token],
// so that a lane reads four tokens at once, the same for the whole warp. Nothing is exchanged
// between lanes but, in the backward, the sums over channels that are the gradients of B and C.
//
// When gradients are wanted, the forward saves the states before every CHUNK tokens. The backward
// takes the chunks from the last to the first: from the saved state it finds that before each tile,
// then takes the tiles from the last to the first.
//
//   X_KIND DELTA_KIND B_KIND C_KIND Z_KIND SKIP_KIND BIAS_KIND   see numbers.cuh
//   X_TOKEN DELTA_TOKEN B_TOKEN C_TOKEN Z_TOKEN   strides from token to token, in elements: known
//             here, they cost no instructions
//   CHANNELS  of a row
//   STATES    any number
//   PER_LANE  channels a lane: 1 or 2
//   TILE      tokens: 4, 8 or 16
//   CHUNK     tokens from saved state to saved state, a multiple of TILE
//   WARPS     of a block
//   BLOCKS    that shall fit on a multiprocessor
//   HAS_SKIP HAS_Z HAS_BIAS SOFTPLUS FLOOR SCALE DECAY VALID INITIAL PACKED  0 or 1
//   WIDE      1: a lane's two channels can be read and written at once
//   SAVE      1: the forward saves states
//   BACKWARD  which of the kernels this is
//   SHARED    bytes of shared memory, as launched

#include "numbers.cuh"

constexpr bool EVEN = CHANNELS % (WARPS * 32 * PER_LANE) == 0;
// The forward compares what Δ is made of with a limit, and has a second loop for where that is
// doubtful. The backward, whose loop needs all registers there are, compares Δ itself and decides
// again what is close to its floor: that takes less there. Both freeze the same tokens.
constexpr bool LIMITS = FLOOR && SOFTPLUS && !BACKWARD;

struct Parameters {
    const void *x, *delta, *B, *C, *z, *skip, *bias;
    const float *A, *floor, *scale, *decay, *initial;
    const u8* valid;
    const i64* bounds;
    void* y;
    float *final, *saved;
    const void* dy;
    const float* dfinal;
    void *dx, *ddelta, *dz;
    float *dA, *dB, *dC, *dskip, *dbias, *dinitial;
    i64 x_row, delta_row, B_row, C_row, z_row, valid_row;  // strides in elements
    i64 valid_token, length, part;
    int floor_row, scale_row, decay_row;
};

#include "lanes.cuh"

constexpr int COLUMNS = STATES * SPAN;  // one number for every state and channel of a warp
constexpr int TILES = CHUNK / TILE;

static_assert(CHUNK % TILE == 0, "tiles do not fit");

// Copies to shared memory that go on in the background, until the thread waits for all of its own.
__device__ __forceinline__ void copy_begin(float* to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                     static_cast<u32>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
}

__device__ __forceinline__ void copies_end() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Which tokens a row has, among those of the tensors.
struct Row : Sequence {
    i64 chunk;

    __device__ __forceinline__ explicit Row(const Parameters& p) {
        row = blockIdx.y;
        batch = PACKED ? 0 : row;
        first = PACKED ? p.bounds[row] : 0;
        length = PACKED ? p.bounds[row + 1] - first : p.length;
        chunk = PACKED ? first / CHUNK + row : row * ((p.length + CHUNK - 1) / CHUNK);
    }
    __device__ __forceinline__ int chunks() const {
        return static_cast<int>((length + CHUNK - 1) / CHUNK);
    }
};

__device__ __forceinline__ int first_channel() {
    return (blockIdx.x * WARPS + __shfl_sync(~0u, threadIdx.x / 32, 0)) * SPAN;
}

__device__ __forceinline__ Lane lane_of(const Parameters& p, const Row& row) {
    Lane at(p, row, first_channel());
    at.doubtful = false;
#pragma unroll
    for (int c = 0; c < (FLOOR ? PER_LANE : 0); c++) {
        at.floor[c] = c < at.count ? p.floor[row.row * p.floor_row + at.channel + c] : 0.0f;
        if (!LIMITS) continue;
        Limit limit = limit_of<1>(at.scale[c], at.floor[c], 0);
        at.floor[c] = limit.low;
        at.doubtful |= limit.doubtful();
    }
    return at;
}

// The rates of a lane's channels, for exp2, into its columns.
__device__ __forceinline__ void place_rates(float* to, const Parameters& p, const Lane& at,
                                            const Row& row) {
#pragma unroll
    for (int c = 0; c < PER_LANE; c++) {
        bool here = c < at.count;
        i64 d = at.channel + c;
        float scale = DECAY && here ? p.decay[row.row * p.decay_row + d] : 1.0f;
        for (int n = 0; n < STATES; n++) {
            float A = here ? p.A[d * STATES + n] : 0.0f;
            // A = -inf forgets at once, but a frozen or padded token must not make it NaN.
            to[n * SPAN + c] = max_or_nan(A * scale * LOG2E, -3e38f);
        }
    }
}

// The columns of a lane from or to (row, channel, state).
__device__ __forceinline__ void columns_from(float* to, const float* from, const Lane& at, i64 row) {
#pragma unroll
    for (int c = 0; c < PER_LANE; c++)
        for (int n = 0; n < STATES; n++)
            to[n * SPAN + c] =
                from && c < at.count ? from[(row * CHANNELS + at.channel + c) * STATES + n] : 0.0f;
}

__device__ __forceinline__ void columns_to(float* to, const float* from, const Lane& at, i64 row) {
#pragma unroll
    for (int c = 0; c < PER_LANE; c++)
        for (int n = 0; n < STATES; n++)
            if (c < at.count)
                to[(row * CHANNELS + at.channel + c) * STATES + n] = from[n * SPAN + c];
}

#if !BACKWARD

constexpr int WARP_SHARED = 2 * COLUMNS + 2 * SQUARE;

struct Forward {
    const Parameters& p;
    Row row;
    Lane at;
    float *A, *h, *B, *C;  // A and h: the lane's columns
    Projection<B_KIND, B_TOKEN> B_from;
    Projection<C_KIND, C_TOKEN> C_from;
    char* y;

    __device__ __forceinline__ Forward(const Parameters& given, float* shared)
        : p(given), row(given), at(lane_of(given, row)) {
        A = shared + at.lane * PER_LANE;
        h = A + COLUMNS;
        B = shared + 2 * COLUMNS;
        C = B + SQUARE;
        B_from.place(p.B, row.batch * p.B_row, row.first);
        C_from.place(p.C, row.batch * p.C_row, row.first);
        y = static_cast<char*>(p.y) +
            ((row.batch * p.length + row.first) * CHANNELS + at.channel) * BYTES<X_KIND>;
        place_rates(A, p, at, row);
        columns_from(h, INITIAL ? p.initial : nullptr, at, row.row);
    }

    __device__ __forceinline__ void save(int chunk) const {
        float* to = p.saved + (row.chunk + chunk) * STATES * CHANNELS + at.channel;
#pragma unroll 4
        for (int n = 0; n < STATES; n++)
#pragma unroll
            for (int c = 0; c < PER_LANE; c++)
                if (c < at.count) to[static_cast<i64>(n) * CHANNELS + c] = h[n * SPAN + c];
    }

    __device__ __forceinline__ void advance(const float (&step)[PER_LANE][TILE],
                                            const float (&written)[PER_LANE][TILE],
                                            float (&sum)[PER_LANE][TILE]) {
#pragma unroll 2
        for (int n = 0; n < STATES; n++) {
            float rate[PER_LANE], state[PER_LANE], b[TILE], c[TILE];
            read_column(rate, A + n * SPAN);
            read_column(state, h + n * SPAN);
            read_square(b, B + n * TILE);
            read_square(c, C + n * TILE);
#pragma unroll
            for (int t = 0; t < TILE; t++)
#pragma unroll
                for (int k = 0; k < PER_LANE; k++) {
                    float decay = decay_of(step[k][t], rate[k]);
                    state[k] = fmaf(decay, state[k], written[k][t] * b[t]);
                    sum[k][t] = fmaf(c[t], state[k], sum[k][t]);
                }
            write_column(h + n * SPAN, state);
        }
    }

    template <bool FULL, bool DOUBTS>
    __device__ __forceinline__ void tile(i64 token, int rows) {
        Raw<X_KIND> x[TILE];
        Raw<DELTA_KIND> delta[TILE];
        Raw<Z_KIND> z[TILE];
        at.delta.template load<FULL>(delta, token, rows, at.count);
        at.x.template load<FULL>(x, token, rows, at.count);
        B_from.template load<FULL>(token, rows, at.lane);
        C_from.template load<FULL>(token, rows, at.lane);
        if (HAS_Z) at.z.template load<FULL>(z, token, rows, at.count);
        __syncwarp();
        B_from.spread(B, at.lane);
        C_from.spread(C, at.lane);
        float step[PER_LANE][TILE], written[PER_LANE][TILE], sum[PER_LANE][TILE];
        at.template make<FULL>(step, written, delta, x, token, rows);
        if (DOUBTS) at.settle_tile(step, p, row.row, token, rows);
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                sum[k][t] = at.skip[k] * written[k][t];
                written[k][t] *= step[k][t];
            }
        __syncwarp();
        advance(step, written, sum);
        char* to = y + token * CHANNELS * BYTES<X_KIND>;
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            float out[PER_LANE];
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                out[k] = sum[k][t];
                if (HAS_Z) out[k] *= z[t].at(k) * sigmoid(z[t].at(k));
                if (VALID && !at.template open<FULL>(token, t, rows)) out[k] = 0.0f;
            }
            store<X_KIND, FULL && EVEN>(to + t * CHANNELS * BYTES<X_KIND>, out,
                                        FULL || t < rows ? at.count : 0);
        }
    }

    template <bool DOUBTS>
    __device__ __forceinline__ void walk() {
#pragma unroll 1
        for (i64 token = 0; token < row.length; token += TILE) {
            if (SAVE && token % CHUNK == 0) save(static_cast<int>(token / CHUNK));
            int rows = rows_of(row.length - token);
            if (!DOUBTS && rows == TILE)
                tile<true, DOUBTS>(token, TILE);
            else
                tile<false, DOUBTS>(token, rows);
        }
    }

    __device__ __forceinline__ void run() {
        if (LIMITS && !__all_sync(~0u, !at.doubtful))
            walk<true>();
        else
            walk<false>();
        columns_to(p.final, h, at, row.row);
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    selective_scan_wide(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) float buffers[];
    static_assert(SHARED == WARPS * WARP_SHARED * 4, "the launch has another size");
    Forward(p, buffers + threadIdx.x / 32 * WARP_SHARED).run();
}

#else

constexpr int WARP_SHARED = (3 + TILES) * COLUMNS + 2 * SQUARE;
constexpr int SUMS = 2 * SQUARE;  // of one warp's channels: gradients of B, then of C, of a tile

// Two lanes that differ in one bit hold sums of two sets of numbers: each keeps one set, and gets the
// other lane's part of it.
template <int HALF, int COUNT>
__device__ __forceinline__ void exchange(float (&v)[COUNT], int lane, int bit) {
    bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        float given = upper ? v[i] : v[i + HALF];
        v[i] = (upper ? v[i + HALF] : v[i]) + __shfl_xor_sync(~0u, given, bit);
    }
}

// Adds up each of TILE numbers over the lanes of a warp; a lane is left with the sum of one token.
__device__ __forceinline__ float sum_over_lanes(float (&v)[TILE], int lane) {
    if (TILE >= 16) exchange<TILE / 2>(v, lane, 8);
    if (TILE >= 8) exchange<TILE >= 16 ? 4 : TILE / 2>(v, lane, 4);
    exchange<2>(v, lane, 2);
    exchange<1>(v, lane, 1);
    float sum = v[0];
#pragma unroll
    for (int bit = TILE; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    return sum;
}

struct Backward {
    const Parameters& p;
    Row row;
    Lane at;
    float *A, *G, *dA, *before, *B, *C;  // the first four: the lane's columns
    float *sums, *all_sums;              // of this warp, of the block; two sets in turn
    int set, warp;
    Projection<B_KIND, B_TOKEN> B_from;
    Projection<C_KIND, C_TOKEN> C_from;
    Stream<X_KIND, CHANNELS> dy;
    i64 out;  // of the row's first token and the lane's first channel in a dense tensor
    float dskip[PER_LANE], dbias[PER_LANE];

    __device__ __forceinline__ Backward(const Parameters& given, float* shared)
        : p(given), row(given), at(lane_of(given, row)) {
        warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        float* mine = shared + warp * WARP_SHARED;
        A = mine + at.lane * PER_LANE;
        G = A + COLUMNS;
        dA = G + COLUMNS;
        before = dA + COLUMNS;
        B = mine + (3 + TILES) * COLUMNS;
        C = B + SQUARE;
        all_sums = shared + WARPS * WARP_SHARED;
        sums = all_sums + warp * SUMS;
        set = 0;
        B_from.place(p.B, row.batch * p.B_row, row.first);
        C_from.place(p.C, row.batch * p.C_row, row.first);
        out = (row.batch * p.length + row.first) * CHANNELS + at.channel;
        dy.place(p.dy, row.batch * p.length * CHANNELS, row.first, at.channel);
        place_rates(A, p, at, row);
        columns_from(G, p.dfinal, at, row.row);
        columns_from(dA, nullptr, at, row.row);
        columns_from(before, nullptr, at, row.row);
        forget_sums();
    }

    // Begin to copy the states before a chunk; `before` must be of no more use to the last one.
    __device__ __forceinline__ void restore(int chunk) {
        const float* from = p.saved + (row.chunk + chunk) * STATES * CHANNELS + at.channel;
#pragma unroll 8
        for (int n = 0; n < STATES; n++)
#pragma unroll
            for (int c = 0; c < PER_LANE; c++)
                if (c < at.count) copy_begin(before + n * SPAN + c, from + n * CHANNELS + c);
    }

    // Everything that the chunk before this one is made of.
    __device__ __forceinline__ void ask_ahead(int chunk) const {
        i64 token = static_cast<i64>(chunk) * CHUNK;
        at.delta.template ask<CHUNK>(token, row.length, at.lane, at.channel);
        at.x.template ask<CHUNK>(token, row.length, at.lane, at.channel);
        if (HAS_Z) at.z.template ask<CHUNK>(token, row.length, at.lane, at.channel);
        dy.template ask<CHUNK>(token, row.length, at.lane, at.channel);
        B_from.template ask<CHUNK>(token, row.length, at.lane);
        C_from.template ask<CHUNK>(token, row.length, at.lane);
        int first = at.channel - at.lane * PER_LANE;
        const float* saved = p.saved + (row.chunk + chunk) * STATES * CHANNELS + first;
        ask_for<STATES, SPAN / 8>(reinterpret_cast<const char*>(saved), CHANNELS * 4, STATES, at.lane,
                                  CHANNELS - first, 8);
    }

    // The states before the tile behind this one.
    __device__ __forceinline__ void sweep(i64 token, int tile) {
        constexpr bool FULL = true;  // there is a tile behind it
        constexpr int rows = TILE;
        Raw<X_KIND> x[TILE];
        Raw<DELTA_KIND> delta[TILE];
        at.delta.template load<FULL>(delta, token, rows, at.count);
        at.x.template load<FULL>(x, token, rows, at.count);
        B_from.template load<FULL>(token, rows, at.lane);
        __syncwarp();
        B_from.spread(B, at.lane);
        float step[PER_LANE][TILE], written[PER_LANE][TILE];
        at.template make<FULL>(step, written, delta, x, token, rows);
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) written[k][t] *= step[k][t];
        __syncwarp();
        const float* from = before + tile * COLUMNS;
#pragma unroll 1
        for (int n = 0; n < STATES; n++) {
            float rate[PER_LANE], state[PER_LANE], b[TILE];
            read_column(rate, A + n * SPAN);
            read_column(state, from + n * SPAN);
            read_square(b, B + n * TILE);
#pragma unroll
            for (int t = 0; t < TILE; t++)
#pragma unroll
                for (int k = 0; k < PER_LANE; k++)
                    state[k] = fmaf(decay_of(step[k][t], rate[k]), state[k],
                                    written[k][t] * b[t]);
            write_column(before + (tile + 1) * COLUMNS + n * SPAN, state);
        }
    }

    // A tile's numbers, and the sums over the states that are gathered for each of its tokens.
    struct Tile {
        float step[PER_LANE][TILE], written[PER_LANE][TILE], dy[PER_LANE][TILE];
        float y[PER_LANE][TILE], into[PER_LANE][TILE], through[PER_LANE][TILE];
    };

    template <bool FULL>
    __device__ __forceinline__ void read(Tile& of, i64 token, int rows) {
        Raw<X_KIND> x[TILE], given[TILE];
        Raw<DELTA_KIND> delta[TILE];
        Raw<Z_KIND> z[TILE];
        at.delta.template load<FULL>(delta, token, rows, at.count);
        at.x.template load<FULL>(x, token, rows, at.count);
        B_from.template load<FULL>(token, rows, at.lane);
        C_from.template load<FULL>(token, rows, at.lane);
        if (HAS_Z) at.z.template load<FULL>(z, token, rows, at.count);
        dy.template load<FULL>(given, token, rows, at.count);
        __syncwarp();
        B_from.spread(B, at.lane);
        C_from.spread(C, at.lane);
        at.template make<FULL>(of.step, of.written, delta, x, token, rows);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            bool open = at.template open<FULL>(token, t, rows);
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                of.written[k][t] *= of.step[k][t];
                float slope = given[t].at(k);
                if (HAS_Z) slope *= z[t].at(k) * sigmoid(z[t].at(k));
                of.dy[k][t] = VALID && !open ? 0.0f : slope;
                of.y[k][t] = of.into[k][t] = of.through[k][t] = 0.0f;
            }
        }
        __syncwarp();
    }

    // One state through a tile and back.
    __device__ __forceinline__ void state(Tile& of, int n, const float* from) {
        float rate[PER_LANE], now[PER_LANE], b[TILE], c[TILE], part[TILE];
        float decay[PER_LANE][TILE], kept[PER_LANE][TILE];
        read_column(rate, A + n * SPAN);
        read_column(now, from + n * SPAN);
        read_square(b, B + n * TILE);
        read_square(c, C + n * TILE);
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                decay[k][t] = decay_of(of.step[k][t], rate[k]);
                kept[k][t] = decay[k][t] * now[k];
                now[k] = fmaf(of.written[k][t], b[t], kept[k][t]);
                of.y[k][t] = fmaf(c[t], now[k], of.y[k][t]);
                part[t] = k ? fmaf(of.dy[k][t], now[k], part[t]) : of.dy[k][t] * now[k];
            }
        float dC = sum_over_lanes(part, at.lane);
        float grad[PER_LANE], rate_grad[PER_LANE];
        read_column(grad, G + n * SPAN);
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) rate_grad[k] = 0.0f;
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--)
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                grad[k] = fmaf(of.dy[k][t], c[t], grad[k]);
                of.into[k][t] = fmaf(grad[k], b[t], of.into[k][t]);
                part[t] = k ? fmaf(of.written[k][t], grad[k], part[t]) : of.written[k][t] * grad[k];
                float passed = grad[k] * kept[k][t];
                of.through[k][t] = fmaf(passed, rate[k], of.through[k][t]);
                rate_grad[k] = fmaf(passed, of.step[k][t], rate_grad[k]);
                grad[k] *= decay[k][t];
            }
        write_column(G + n * SPAN, grad);
        float before_now[PER_LANE];
        read_column(before_now, dA + n * SPAN);
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) rate_grad[k] += before_now[k];
        write_column(dA + n * SPAN, rate_grad);
        float dB = sum_over_lanes(part, at.lane);
        float* to = sums + set * WARPS * SUMS + at.lane * STATES + n;
        if (at.lane < TILE) to[0] = dB, to[SQUARE] = dC;
    }

    template <bool FULL>
    __device__ __forceinline__ void write(const Tile& of, i64 token, int rows) {
        Raw<X_KIND> x[TILE], given[TILE];
        Raw<DELTA_KIND> delta[TILE];
        Raw<Z_KIND> z[TILE];
        at.delta.template load<FULL>(delta, token, rows, at.count);
        at.x.template load<FULL>(x, token, rows, at.count);
        if (HAS_Z) at.z.template load<FULL>(z, token, rows, at.count);
        if (HAS_Z) dy.template load<FULL>(given, token, rows, at.count);
        i64 at_tile = out + token * CHANNELS;
        float dskip_here[PER_LANE], dbias_here[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) dskip_here[k] = dbias_here[k] = 0.0f;
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            bool open = at.template open<FULL>(token, t, rows);
            int count = FULL || t < rows ? at.count : 0;
            float dx[PER_LANE], ddelta[PER_LANE], dz[PER_LANE];
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                float value = VALID && !open ? 0.0f : x[t].at(k);
                float raw = delta[t].at(k) + at.bias[k];
                float slope = SOFTPLUS ? sigmoid(raw) : 1.0f;
                if (SCALE) slope *= at.scale[k];
                bool stopped = !open || at.froze(raw, k, of.step[k][t]);
                dx[k] = fmaf(of.step[k][t], of.into[k][t], at.skip[k] * of.dy[k][t]);
                ddelta[k] = fmaf(of.through[k][t], LN2, of.into[k][t] * value) * slope;
                if (stopped) ddelta[k] = 0.0f;
                dskip_here[k] = fmaf(of.dy[k][t], value, dskip_here[k]);
                dbias_here[k] += ddelta[k];
                if (HAS_Z) {
                    float gate = z[t].at(k), share = sigmoid(gate);
                    float y = fmaf(at.skip[k], value, of.y[k][t]);
                    dz[k] = given[t].at(k) * y * share * fmaf(gate, 1.0f - share, 1.0f);
                    if (VALID && !open) dz[k] = 0.0f;
                }
            }
            i64 to = at_tile + t * CHANNELS;
            store<X_KIND, FULL && EVEN>(static_cast<char*>(p.dx) + to * BYTES<X_KIND>, dx, count);
            store<DELTA_KIND, FULL && EVEN>(static_cast<char*>(p.ddelta) + to * BYTES<DELTA_KIND>, ddelta, count);
            if (HAS_Z) store<Z_KIND, FULL && EVEN>(static_cast<char*>(p.dz) + to * BYTES<Z_KIND>, dz, count);
        }
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) dskip[k] += dskip_here[k], dbias[k] += dbias_here[k];
    }

    // The block's share of the gradients of B and C, once all of its warps are there.
    template <bool FULL>
    __device__ __forceinline__ void flush(i64 token, int rows) {
        __syncthreads();
        const float* from = all_sums + set * WARPS * SUMS;
        i64 to = (blockIdx.x * p.part + row.batch * p.length + row.first + token) * STATES;
#pragma unroll
        for (int start = 0; start < SQUARE; start += WARPS * 32) {
            int item = start + threadIdx.x;
            if (item >= (FULL ? SQUARE : rows * STATES)) continue;
            p.dB[to + item] = over_warps(from + item);
            p.dC[to + item] = over_warps(from + SQUARE + item);
        }
        set ^= 1;
    }
    __device__ __forceinline__ static float over_warps(const float* from) {
        float total = from[0];
#pragma unroll
        for (int w = 1; w < WARPS; w++) total += from[w * SUMS];
        return total;
    }

    template <bool FULL>
    __device__ __forceinline__ void tile(i64 token, int rows, const float* from, int next) {
        Tile of;
        read<FULL>(of, token, rows);
#pragma unroll 1
        for (int n = 0; n < STATES; n++) state(of, n, from);
        if (next >= 0) restore(next);
        write<FULL>(of, token, rows);
        flush<FULL>(token, rows);
    }

    __device__ __forceinline__ void run() {
        int chunks = row.chunks();
        if (chunks == 0) settle(true);
        if (chunks > 0) restore(chunks - 1);
#pragma unroll 1
        for (int chunk = chunks - 1; chunk >= 0; chunk--) {
            i64 first = static_cast<i64>(chunk) * CHUNK;
            copies_end();
            if (chunk > 0) ask_ahead(chunk - 1);
#pragma unroll 1
            for (int i = 0; i < TILES - 1; i++)
                if (first + (i + 1) * TILE < row.length) sweep(first + i * TILE, i);
#pragma unroll 1
            for (int i = TILES - 1; i >= 0; i--) {
                int rows = rows_of(row.length - first - i * TILE);
                int next = i == 0 ? chunk - 1 : -1;
                if (rows == TILE)
                    tile<true>(first + i * TILE, TILE, before + i * COLUMNS, next);
                else if (rows > 0)
                    tile<false>(first + i * TILE, rows, before + i * COLUMNS, next);
            }
            if (chunk % SETTLED == 0) settle(chunk + SETTLED >= chunks);
        }
        columns_to(p.dinitial, G, at, row.row);
    }

    __device__ __forceinline__ void forget_sums() {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) dskip[k] = dbias[k] = 0.0f;
    }

    // Sums over tokens go to memory once in a while: fewer roundings in a row.
    static constexpr int SETTLED = 64;  // chunks
    __device__ __forceinline__ void settle(bool is_first) {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            if (k >= at.count) continue;
            i64 d = row.row * CHANNELS + at.channel + k;
            float scale = DECAY ? p.decay[row.row * p.decay_row + at.channel + k] : 1.0f;
#pragma unroll 1
            for (int n = 0; n < STATES; n++) {
                add(p.dA + d * STATES + n, dA[n * SPAN + k] * scale, is_first);
                dA[n * SPAN + k] = 0.0f;
            }
            add(p.dskip + d, dskip[k], is_first);
            add(p.dbias + d, dbias[k], is_first);
        }
        forget_sums();
    }
    __device__ __forceinline__ static void add(float* to, float value, bool is_first) {
        *to = is_first ? value : *to + value;
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    selective_scan_wide(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) float buffers[];
    static_assert(SHARED == WARPS * (WARP_SHARED + 2 * SUMS) * 4, "the launch has another size");
    Backward(p, buffers).run();
}

#endif
