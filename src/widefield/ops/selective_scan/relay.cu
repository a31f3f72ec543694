// The selective scan's forward for few long rows, compiled at run time for one set of the macros
// below.
//
// A cluster of CLUSTER blocks owns GROUPS groups of COLUMNS channels of one row. Its warps take pieces
// of TILES tiles of TILE tokens: a lane has one tile of one channel, whose Δ and Δ·x are in its
// registers, and goes through the states one after the other. Of each it first makes
//
//     the decays a_t = exp(Δ_t A), the writes w_t = Δ_t x_t B_t,
//     H = what the tile leaves behind when it begins with nothing, and P = exp(A Σ Δ_t),
//
// which needs no other tile. Lanes of one channel put theirs together, and the warp waits for the
// state h before its piece, hands P h + H on to the warp with the next piece, and only then walks
// through its tokens from the state before each tile. So every decay is computed once, though the
// sequence is cut up, and from piece to piece there is but one multiply-add.
//
// A task is WARPS pieces of a group, for the warps of a block. Tasks are numbered in the order of time,
// those of the cluster's groups by turns, and so are its blocks: task i is of block i modulo CLUSTER.
// States go from warp to warp through shared memory, and from the last warp of a block to the first of
// the next, each together with a tag that says whose it is. What a warp reads for its next piece is
// copied to shared memory while it is busy with the one before.
//
//   the macros of lanes.cuh, with PER_LANE 1
//   COLUMNS   channels of a group: 8, 16 or 32
//   GROUPS    of a cluster
//   CLUSTER   blocks of a cluster
//   WARPS     of a block
//   DECAY INITIAL  0 or 1
//   ENDS      where the row's sequences end: 0 there is one, 1 as int, 2 as long long
//   EXACT     see numbers.cuh
//   ALIGNED   1: x, Δ and z can be copied 16 bytes at a time
//   ALIGNED_BC  1: and so can B and C
//   SHARED    bytes of shared memory, as launched

#include "numbers.cuh"

constexpr bool LIMITS = FLOOR && SOFTPLUS;
constexpr bool EVEN = CHANNELS % COLUMNS == 0;

struct Parameters {
    const void *x, *delta, *B, *C, *z, *skip, *bias;
    const float *A, *floor, *scale, *decay, *initial;
    const u8* valid;
    const void* ends;
    void* y;
    float* final;
    i64 x_row, delta_row, B_row, C_row, z_row, valid_row;  // strides in elements
    i64 valid_token, length;
    int floor_row, scale_row, decay_row;
};

#include "lanes.cuh"

constexpr int TILES = 32 / COLUMNS;
constexpr int PIECE = TILES * TILE;       // tokens
constexpr int TASK = WARPS * PIECE;       // tokens
constexpr int OWNED = GROUPS * COLUMNS;   // channels of a cluster
constexpr int FIELD = STATES * COLUMNS;   // a number for every state and channel of a group

static_assert(PER_LANE == 1 && WARPS > 1, "a lane has one channel, a block several warps");

// ---- shared memory ------------------------------------------------------------------------------

// An address in shared memory.
__device__ __forceinline__ u32 shared_at(const void* generic) {
    return static_cast<u32>(__cvta_generic_to_shared(generic));
}
// The same place in another block of the cluster.
__device__ __forceinline__ u32 shared_of(u32 block, u32 address) {
#if CLUSTER > 1
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
#endif
    return address;
}
__device__ __forceinline__ u32 rank_of_block() {
    u32 rank = 0;
#if CLUSTER > 1
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
// Until all threads of the cluster are there.
__device__ __forceinline__ void meet() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
// As all of the cluster sees it: in shared memory of any block, and of this one.
#if CLUSTER > 1
#define RELAXED "relaxed.cluster.shared::cluster"
#define RELAXED_HERE "relaxed.cluster.shared::cta"
#else
#define RELAXED "relaxed.cta.shared"
#define RELAXED_HERE RELAXED
#endif

// A state and its tag, read and written at once.
__device__ __forceinline__ u64 look(u32 from) {
    u64 both;
    asm volatile("ld." RELAXED_HERE ".b64 %0, [%1];" : "=l"(both) : "r"(from));
    return both;
}
__device__ __forceinline__ void hand(u32 to, float state, u32 tag) {
    asm volatile("st." RELAXED ".b64 [%0], %1;" ::"r"(to),
                 "l"(static_cast<u64>(tag) << 32 | __float_as_uint(state)));
}
__device__ __forceinline__ u32 tag_of(u64 both) { return static_cast<u32>(both >> 32); }
__device__ __forceinline__ float state_of(u64 both) {
    return __uint_as_float(static_cast<u32>(both));
}
// By these warps tell each other how far they are.
__device__ __forceinline__ u32 look_up(u32 from) {
    u32 v;
    asm volatile("ld." RELAXED ".b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ void announce(u32 to, u32 v) {
    asm volatile("st." RELAXED_HERE ".b32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
// Whoever waits calls this in the loop.
__device__ __forceinline__ void let_others() {}

// 16 bytes to shared memory in the background, zeros behind the first `count` of them.
__device__ __forceinline__ void copy16(char* to, const char* from, int count) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_at(to)), "l"(from),
                 "r"(count)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all copies but those of the last group are there.
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
}

// A value that is kept in its register, not computed again.
__device__ __forceinline__ float opaque(float v) {
    asm volatile("" : "+f"(v));
    return v;
}

// A tensor's numbers of one piece in shared memory, COUNT of each token, as they lie in global memory.
template <int KIND, i64 TOKEN, int COUNT, bool WHOLE_ROWS>
struct Copied {
    static constexpr int ROW = COUNT * BYTES<KIND>;
    // Lanes of different tiles read at the same time: from different banks.
    static constexpr int TILE_BYTES = (TILE * ROW + 15) / 16 * 16 + (TILES > 1 ? ROW % 128 : 0);
    static constexpr int SIZE = (TILES * TILE_BYTES + 15) / 16 * 16;
    static constexpr bool FAST = WHOLE_ROWS && ROW % 16 == 0 && (ROW & (ROW - 1)) == 0;
    static constexpr i64 STEP = TOKEN * BYTES<KIND>;

    // Of `rows` tokens, of which `count` numbers exist; FULL, if that is all. `element` is the first.
    template <bool FULL>
    __device__ __forceinline__ static void fetch(char* to, const void* base, i64 element, int rows,
                                                 int count, int lane) {
        const char* from = static_cast<const char*>(base) + element * BYTES<KIND>;
        if constexpr (FAST)
            copy<FULL>(to, from, rows, count, lane);
        else
            move(to, from, rows, count, lane);
    }
    // 16 bytes at a time, in the background.
    template <bool FULL>
    __device__ __forceinline__ static void copy(char* to, const char* from, int rows, int count,
                                                int lane) {
        constexpr int PARTS = ROW < 16 ? 1 : ROW / 16;
        constexpr int TOKENS = PARTS > 32 ? 1 : 32 / PARTS;  // that a warp copies at once
        int part = lane % PARTS * 16, first = PARTS > 32 ? 0 : lane / PARTS;
        const char* here = from + first * STEP + part;
        to += first * ROW + part;
#pragma unroll
        for (int t = 0; t < PIECE; t += TOKENS) {
            int tile = TOKENS > TILE ? (t + first) / TILE : t / TILE;
            int gap = tile * (TILE_BYTES - TILE * ROW);
#pragma unroll
            for (int k = 0; k < PARTS * 16; k += 512) {
                const char* at = here + t * STEP + k;
                if (FULL && PIECE % TOKENS == 0) {
                    copy16(to + t * ROW + k + gap, at, 16);
                } else if (t + first < PIECE) {
                    bool there = t + first < rows;
                    int left = min(max(count * BYTES<KIND> - part - k, 0), 16);
                    copy16(to + t * ROW + k + gap, there ? at : from, there ? left : 0);
                }
            }
        }
    }
    // One number at a time.
    __device__ __forceinline__ static void move(char* to, const char* from, int rows, int count,
                                                int lane) {
        for (int i = lane; i < PIECE * COUNT; i += 32) {
            int t = i / COUNT, k = i % COUNT;
            bool here = t < rows && k < count;
            const char* number = from + t * STEP + k * BYTES<KIND>;
            *reinterpret_cast<Number<KIND>*>(at(to, t, k)) =
                here ? *reinterpret_cast<const Number<KIND>*>(number) : Number<KIND>(0);
        }
    }
    __device__ __forceinline__ static char* at(char* to, int t, int k) {
        return to + t / TILE * TILE_BYTES + t % TILE * ROW + k * BYTES<KIND>;
    }
    __device__ __forceinline__ static u32 read(const char* from) {
        return *reinterpret_cast<const Number<KIND>*>(from);
    }
};

using CopiedX = Copied<X_KIND, X_TOKEN, COLUMNS, ALIGNED && EVEN>;
using CopiedDelta = Copied<DELTA_KIND, DELTA_TOKEN, COLUMNS, ALIGNED && EVEN>;
using CopiedZ = Copied<Z_KIND, Z_TOKEN, COLUMNS, ALIGNED && EVEN>;
using CopiedB = Copied<B_KIND, B_TOKEN, STATES, ALIGNED_BC>;
using CopiedC = Copied<C_KIND, C_TOKEN, STATES, ALIGNED_BC>;

constexpr int PITCH = TILE + 4;  // of a state in B or C of a tile, in floats

struct WarpShared {
    float B[TILES][STATES][PITCH], C[TILES][STATES][PITCH];
    char x[CopiedX::SIZE], delta[CopiedDelta::SIZE], z[HAS_Z ? CopiedZ::SIZE : 16];
    char B_raw[CopiedB::SIZE], C_raw[CopiedC::SIZE];
};

struct alignas(16) Shared {
    WarpShared warp[WARPS];
    u64 before[2][FIELD];           // the state before the block's task, in even and in odd rounds
    u64 between[WARPS - 1][FIELD];  // and between its warps
    float rates[GROUPS * FIELD + COLUMNS];
    float bias[OWNED], scale[OWNED], skip[OWNED], low[OWNED], high[OWNED];
    u32 done[WARPS];  // rounds of which a warp needs nothing any more
};

// ---- what a block works on ----------------------------------------------------------------------

__device__ __forceinline__ Sequence sequence_of(const Parameters& p, i64 row) {
    i64 first = ENDS ? end_at<ENDS>(p.ends, row) : 0;
    return {row, ENDS ? 0 : row, first, ENDS ? end_at<ENDS>(p.ends, row + 1) - first : p.length};
}

struct Block {
    const Parameters& p;
    Shared& shared;
    Sequence row;
    u32 tasks;  // of a group
    u32 rank;   // of the block in its cluster
    int lane, warp, first_channel, count;  // count: of the cluster's channels that exist

    __device__ __forceinline__ Block(const Parameters& given, Shared& block)
        : p(given), shared(block), row(sequence_of(given, blockIdx.y)) {
        tasks = static_cast<u32>((row.length + TASK - 1) / TASK);
        rank = rank_of_block();
        // By shuffles: what threads know anyway is otherwise asked for again and again, in the loop.
        lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);
        warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        first_channel = blockIdx.x / CLUSTER * OWNED;
        count = min(OWNED, CHANNELS - first_channel);
    }
    __device__ __forceinline__ int rows_from(i64 token, int most) const {
        i64 left = row.length - token;
        return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
    }
    __device__ __forceinline__ i64 state_at(int column, int n) const {
        return (row.row * CHANNELS + first_channel + column) * STATES + n;
    }

    // What the block knows of its channels, by all of its threads.
    __device__ __forceinline__ void prepare() const {
        for (int i = threadIdx.x; i < 2 * FIELD; i += WARPS * 32) shared.before[0][i] = 0;
        for (int i = threadIdx.x; i < (WARPS - 1) * FIELD; i += WARPS * 32) shared.between[0][i] = 0;
        if (threadIdx.x < WARPS) shared.done[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < GROUPS * FIELD; i += WARPS * 32) {
            int column = i / FIELD * COLUMNS + i % COLUMNS, n = i / COLUMNS % STATES;
            float rate = 0.0f;
            if (column < count) {
                int d = first_channel + column;
                float scale = DECAY ? p.decay[row.row * p.decay_row + d] : 1.0f;
                // A = -inf forgets at once, but a frozen or padded token must not make it NaN.
                rate = max_or_nan(p.A[static_cast<i64>(d) * STATES + n] * scale * LOG2E, -3e38f);
                // A sequence without tokens ends as it begins.
                if (ENDS && tasks == 0 && rank == 0)
                    p.final[state_at(column, n)] = INITIAL ? p.initial[state_at(column, n)] : 0.0f;
            }
            shared.rates[i] = rate;
        }
        for (int c = warp; c < OWNED; c += WARPS) {
            int d = min(first_channel + c, CHANNELS - 1);
            float scale = SCALE ? p.scale[row.row * p.scale_row + d] : 1.0f;
            float floor = FLOOR ? p.floor[row.row * p.floor_row + d] : 0.0f;
            Limit limit = LIMITS ? limit_of<32>(scale, floor, lane) : Limit{floor, floor};
            shared.low[c] = limit.low, shared.high[c] = limit.high, shared.scale[c] = scale;
            shared.bias[c] = HAS_BIAS ? number_at<BIAS_KIND>(p.bias, d) : 0.0f;
            shared.skip[c] = HAS_SKIP ? number_at<SKIP_KIND>(p.skip, d) : 0.0f;
        }
        if (threadIdx.x < COLUMNS) shared.rates[GROUPS * FIELD + threadIdx.x] = 0.0f;
        meet();
    }
};

// ---- the scan -----------------------------------------------------------------------------------

// A warp's part of a task.
struct Piece {
    u32 task;   // among those of all groups
    int group;
    i64 token;  // the first one
    int rows;   // tokens that exist; 0: none
};

struct Runner {
    const Block& of;
    WarpShared& mine;
    int lane, tile, column;

    __device__ __forceinline__ explicit Runner(const Block& block)
        : of(block), mine(block.shared.warp[block.warp]), lane(block.lane) {
        tile = lane / COLUMNS, column = lane % COLUMNS;
    }

    __device__ __forceinline__ Piece piece_of(u32 round) const {
        u32 task = round * CLUSTER + of.rank, number = task / GROUPS;
        i64 token = (static_cast<i64>(number) * WARPS + of.warp) * PIECE;
        int group = static_cast<int>(task % GROUPS);
        bool here = number < of.tasks && group * COLUMNS < of.count;
        return {task, group, token, here ? of.rows_from(token, PIECE) : 0};
    }

    template <typename From, bool FULL>
    __device__ __forceinline__ void copy(char* to, const void* base, i64 row_stride, i64 token_stride,
                                         const Piece& at, int first, int count) const {
        From::template fetch<FULL>(
            to, base, of.row.batch * row_stride + (of.row.first + at.token) * token_stride + first,
            at.rows, count, lane);
    }
    template <bool FULL>
    __device__ __forceinline__ void fetch_some(const Piece& at) const {
        const Parameters& p = of.p;
        int first = of.first_channel + at.group * COLUMNS, count = min(COLUMNS, CHANNELS - first);
        copy<CopiedDelta, FULL>(mine.delta, p.delta, p.delta_row, DELTA_TOKEN, at, first, count);
        copy<CopiedX, FULL>(mine.x, p.x, p.x_row, X_TOKEN, at, first, count);
        copy<CopiedB, FULL>(mine.B_raw, p.B, p.B_row, B_TOKEN, at, 0, STATES);
        copy<CopiedC, FULL>(mine.C_raw, p.C, p.C_row, C_TOKEN, at, 0, STATES);
    }
    __device__ __forceinline__ void fetch(const Piece& at) const {
        if (EVEN && at.rows == PIECE)
            fetch_some<true>(at);
        else if (at.rows > 0)
            fetch_some<false>(at);
        copies_commit();
    }
    __device__ __forceinline__ void fetch_gate(const Piece& at) const {
        int first = of.first_channel + at.group * COLUMNS, count = min(COLUMNS, CHANNELS - first);
        if (HAS_Z && at.rows > 0)
            copy<CopiedZ, false>(mine.z, of.p.z, of.p.z_row, Z_TOKEN, at, first, count);
        copies_commit();
    }

    // B or C as floats, the tokens of a state side by side.
    template <typename From, int KIND>
    __device__ __forceinline__ void spread(float (&to)[TILES][STATES][PITCH],
                                           const char* from) const {
#pragma unroll
        for (int i = 0; i < TILES * STATES; i += 32) {
            int tile = (i + lane) / STATES, n = (i + lane) % STATES;
            if (TILES * STATES % 32 && tile >= TILES) continue;
            const char* here = from + tile * From::TILE_BYTES + n * BYTES<KIND>;
#pragma unroll
            for (int t = 0; t < TILE; t += 4) {
                float v[4];
#pragma unroll
                for (int k = 0; k < 4; k++) v[k] = widen<KIND>(From::read(here + (t + k) * From::ROW));
                *reinterpret_cast<float4*>(&to[tile][n][t]) = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
    }

    // What lanes of the same channel have of a state: what the tiles before a lane's keep of it and
    // leave behind, and what those and its own do.
    struct Passage {
        float kept_before, left_before, kept, left;
    };
    __device__ __forceinline__ Passage together(float kept, float left) const {
        if (TILES == 1) return {1.0f, 0.0f, kept, left};
#pragma unroll
        for (int far = COLUMNS; far < 16; far *= 2) {
            float k = __shfl_up_sync(~0u, kept, far), l = __shfl_up_sync(~0u, left, far);
            if (lane >= far) left = fmaf(kept, l, left), kept *= k;
        }
        if (TILES == 2) {
            float k = __shfl_up_sync(~0u, kept, 16), l = __shfl_up_sync(~0u, left, 16);
            k = lane < 16 ? 1.0f : k, l = lane < 16 ? 0.0f : l;
            return {k, l, kept * k, fmaf(kept, l, left)};
        }
        float k = __shfl_up_sync(~0u, kept, 16), l = __shfl_up_sync(~0u, left, 16);
        if (lane >= 16) left = fmaf(kept, l, left), kept *= k;
        k = __shfl_up_sync(~0u, kept, COLUMNS), l = __shfl_up_sync(~0u, left, COLUMNS);
        return {lane < COLUMNS ? 1.0f : k, lane < COLUMNS ? 0.0f : l, kept, left};
    }

    // Where a warp finds the states before its piece, and where it leaves those behind it.
    struct Baton {
        u32 from, to, tag_in, tag_out;
    };
    __device__ __forceinline__ float relay(const Baton& baton, const Passage& own, u64 given) const {
        while (!__all_sync(~0u, tag_of(given) == baton.tag_in)) {
            let_others();
            given = look(baton.from);
        }
        float state = state_of(given);
        if (tile == TILES - 1) hand(baton.to, fmaf(own.kept, state, own.left), baton.tag_out);
        return TILES == 1 ? state : fmaf(own.kept_before, state, own.left_before);
    }

    // The first warp of a sequence's first task finds the states here as if they had been handed on.
    __device__ __forceinline__ void start(const Piece& at, u32 from) const {
        int c = at.group * COLUMNS + column;
        for (int n = 0; n < STATES; n++)
            hand(from + 8 * COLUMNS * n,
                 INITIAL && c < of.count ? of.p.initial[of.state_at(c, n)] : 0.0f, at.task + 1);
    }
    // Waits until whoever is handed the states has taken those that lay there before.
    __device__ __forceinline__ Baton begin(const Piece& at, u32 round) const {
        Shared& shared = of.shared;
        u32 from, to, done, enough = round, tag_in = round + 1, tag_out = round + 1;
        if (of.warp > 0) {
            from = shared_at(shared.between[of.warp - 1]) + 8 * column;
        } else {
            from = shared_at(shared.before[round & 1]) + 8 * column, tag_in = at.task + 1;
            if (at.task < GROUPS) start(at, from);
        }
        if (of.warp < WARPS - 1) {
            to = shared_at(shared.between[of.warp]) + 8 * column;
            done = shared_at(shared.done + of.warp + 1);
        } else if (at.task / GROUPS + 1 < of.tasks) {
            u32 next = at.task + GROUPS, block = next % CLUSTER, its_round = next / CLUSTER;
            to = shared_of(block, shared_at(shared.before[its_round & 1]) + 8 * column);
            done = shared_of(block, shared_at(shared.done));
            enough = its_round < 2 ? 0 : its_round - 1, tag_out = next + 1;
        } else {
            // The last of the sequence: where the warp itself has just looked.
            to = from, done = shared_at(shared.done), enough = 0;
        }
        while (!__all_sync(~0u, look_up(done) >= enough)) let_others();
        return {from, to, tag_in, tag_out};
    }
    // Of the last piece of a sequence.
    __device__ __forceinline__ void finish(const Piece& at, const Baton& baton) const {
        int c = at.group * COLUMNS + column;
        if (of.warp == WARPS - 1 && at.task / GROUPS + 1 == of.tasks && tile == TILES - 1 && c < of.count)
            for (int n = 0; n < STATES; n++)
                of.p.final[of.state_at(c, n)] = state_of(look(baton.to + 8 * COLUMNS * n));
    }
    __device__ __forceinline__ void end(u32 round) const {
        __syncwarp();
        if (lane == 0) announce(shared_at(of.shared.done + of.warp), round + 1);
    }

    template <bool FULL, bool DOUBTS>
    __device__ __forceinline__ void scan(const Piece& piece, const Piece& next, u32 round) const {
        const Parameters& p = of.p;
        Shared& shared = of.shared;
        int c = piece.group * COLUMNS + column;
        Lane at(p, of.row, lane, of.first_channel + c, shared.bias[c], shared.scale[c],
                shared.skip[c], shared.low[c]);
        int rows = FULL ? TILE : max(0, min(TILE, piece.rows - tile * TILE));
        i64 token = piece.token + tile * TILE;
        float step[1][TILE], written[1][TILE], sum[TILE], total = 0.0f;
        {
            Raw<X_KIND> x[TILE];
            Raw<DELTA_KIND> delta[TILE];
            const char* x_at = CopiedX::at(mine.x, tile * TILE, column);
            const char* delta_at = CopiedDelta::at(mine.delta, tile * TILE, column);
#pragma unroll
            for (int t = 0; t < TILE; t++) {
                delta[t].word[0] = CopiedDelta::read(delta_at + t * CopiedDelta::ROW);
                x[t].word[0] = CopiedX::read(x_at + t * CopiedX::ROW);
            }
            spread<CopiedB, B_KIND>(mine.B, mine.B_raw);
            spread<CopiedC, C_KIND>(mine.C, mine.C_raw);
            at.template make<FULL>(step, written, delta, x, token, rows);
        }
        if (DOUBTS) at.settle_tile(step, p, of.row.row, token, rows);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            sum[t] = at.skip[0] * written[0][t];
            written[0][t] *= step[0][t];
            total += step[0][t];
        }
        total = opaque(total);
        __syncwarp();
        fetch(next);
        Baton baton = begin(piece, round);
        const float* rates = shared.rates + piece.group * FIELD + column;
        const float *b_from = mine.B[tile][0], *c_from = mine.C[tile][0];
#pragma unroll 4
        for (int n = 0; n < STATES; n++) {
            u64 given = look(baton.from);
            float rate = rates[n * COLUMNS], b[TILE], c[TILE], decay[TILE], write[TILE];
            read_square(b, b_from + n * PITCH);
            float left = 0.0f;
#pragma unroll
            for (int t = 0; t < TILE; t++) {
                decay[t] = decay_of(step[0][t], rate);
                write[t] = written[0][t] * b[t];
                left = t ? fmaf(decay[t], left, write[t]) : write[t];
            }
            float state = relay(baton, together(decay_of(total, rate), left), given);
            read_square(c, c_from + n * PITCH);
#pragma unroll
            for (int t = 0; t < TILE; t++) {
                state = fmaf(decay[t], state, write[t]);
                sum[t] = fmaf(c[t], state, sum[t]);
            }
            baton.from += 8 * COLUMNS, baton.to += 8 * COLUMNS;
        }
        baton.to -= 8 * FIELD;
        finish(piece, baton);
        end(round);
        copies_wait();
        __syncwarp();
        char* y = static_cast<char*>(p.y) + ((of.row.batch * p.length + of.row.first + token) * CHANNELS +
                                             at.channel) *
                                                BYTES<X_KIND>;
        const char* z_at = CopiedZ::at(mine.z, tile * TILE, column);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            float out[1] = {sum[t]};
            if (HAS_Z) {
                float z = widen<Z_KIND>(CopiedZ::read(z_at + t * CopiedZ::ROW));
                out[0] *= z * sigmoid(z);
            }
            if (VALID && !at.template open<FULL>(token, t, rows)) out[0] = 0.0f;
            store<X_KIND, FULL && EVEN>(y + t * CHANNELS * BYTES<X_KIND>, out,
                                        FULL || t < rows ? at.count : 0);
        }
    }

    // A piece without tokens.
    __device__ __forceinline__ void pass_on(const Piece& piece, u32 round) const {
        Baton baton = begin(piece, round);
#pragma unroll 1
        for (int n = 0; n < STATES; n++) {
            relay(baton, {1.0f, 0.0f, 1.0f, 0.0f}, look(baton.from));
            baton.from += 8 * COLUMNS, baton.to += 8 * COLUMNS;
        }
        baton.to -= 8 * FIELD;
        finish(piece, baton);
        end(round);
    }

    __device__ __forceinline__ void run() const {
        bool doubtful = false;
        for (int c = 0; c < (LIMITS ? OWNED : 0); c++)
            doubtful |= Limit{of.shared.low[c], of.shared.high[c]}.doubtful();
        doubtful = !__all_sync(~0u, !doubtful);
        Piece piece = piece_of(0);
        fetch(piece);
        fetch_gate(piece);
#pragma unroll 1
        for (u32 round = 0; piece.task / GROUPS < of.tasks; round++) {
            Piece next = piece_of(round + 1);
            copies_wait();
            __syncwarp();
            if (piece.rows == PIECE && !doubtful) {
                scan<true, false>(piece, next, round);
            } else if (piece.rows > 0) {
                scan<false, LIMITS>(piece, next, round);
            } else {
                fetch(next);
                pass_on(piece, round);
            }
            __syncwarp();
            fetch_gate(next);
            piece = next;
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER, 1, 1)
#endif
    selective_scan_relay(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(16) char buffers[];
    static_assert(SHARED == sizeof(Shared), "the launch has another size");
    Block block(p, *reinterpret_cast<Shared*>(buffers));
    block.prepare();
    Runner(block).run();
    meet();  // what is handed on to a block must find it there
}
