// The selective scan's forward for few long rows, compiled at run time for one set of the macros
// below.
//
// A cluster of CLUSTER blocks walks through the tokens of COLUMNS channels of one row at a time. Its
// warps take pieces of TILES tiles of TILE tokens: a lane has one tile of one channel, whose Δ and Δ·x
// are in its registers, and goes through the states one after the other. Of each it first makes
//
//     the decays a_t = exp(Δ_t A), the writes w_t = Δ_t x_t B_t,
//     H = what the tile leaves behind when it begins with nothing, and P = exp(A Σ Δ_t),
//
// which needs no other tile. Lanes of one channel put theirs together, and the warp waits for the
// state h before its piece, hands P h + H on to the warp with the next piece, and only then walks
// through its tokens from the state before each tile. So every decay is computed once, though the
// sequence is cut up, and from piece to piece there is but one multiply-add.
//
// A task is SQUAD pieces that follow each other, for some warps of a block. A cluster's squads take its
// tasks by turns, those of one place in all blocks first. States go from warp to warp through shared
// memory, and from the last warp of a squad to the first of the next, each together with a tag that
// says whose it is. What a warp reads for its next piece is copied to shared memory while it is busy
// with the one before.
//
// All clusters have the same number of tasks, though they have not the same number of groups of
// channels. Put the tasks of all groups of all rows in one line, those of a group in the order of
// time, and cut it into as many parts of one length as there are clusters. A group that lies across a
// cut has its early tasks in one part and its late ones in the next. A cluster takes the groups of
// its part from the last to the first: what is early of a group comes first, what is late comes last,
// and unless a part is shorter than a group, the states that late tasks need are there by then. They
// come through global memory: through `final`, and `arrived` says that they are there. A cluster
// waits for the one before it only, which has begun before it, so that all come to an end, however
// many run at once.
//
//   the macros of lanes.cuh, with PER_LANE 1
//   COLUMNS   channels of a group: 8, 16 or 32
//   SEGMENTS  groups, whole or in part, of a cluster: no more than so many
//   CLUSTER   blocks of a cluster
//   WARPS     of a block
//   DECAY INITIAL  0 or 1
//   ENDS      where the row's sequences end: 0 there is one, 1 as int, 2 as long long
//   EXACT     see numbers.cuh
//   ALIGNED   1: x, Δ and z can be copied 16 bytes at a time
//   ALIGNED_BC  1: and so can B and C
//   SHARED    bytes of shared memory, as launched

#define SELDOM __forceinline__
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
    u32* arrived;  // of each cluster: whether the states are there behind its first segment; all 0,
                   // as they are again in the end
    i64 x_row, delta_row, B_row, C_row, z_row, valid_row;  // strides in elements
    i64 valid_token, length;
    int rows, floor_row, scale_row, decay_row;
};

#include "lanes.cuh"

constexpr int TILES = 32 / COLUMNS;
constexpr int PIECE = TILES * TILE;  // tokens
// Warps of a block whose pieces follow each other. Blocks of a cluster take turns squad by squad, so
// that the warps of a block are busy with different things at a time.
constexpr int SQUAD = CLUSTER > 1 && WARPS % 4 == 0 ? 4 : WARPS;
constexpr int SQUADS = WARPS / SQUAD;
constexpr int WORKERS = SQUADS * CLUSTER;  // squads of a cluster
constexpr int TASK = SQUAD * PIECE;        // tokens
constexpr int GROUPS = (CHANNELS + COLUMNS - 1) / COLUMNS;  // of a row
constexpr int FIELD = STATES * COLUMNS;  // a number for every state and channel of a group

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

// Where a state is handed on to: an address in shared memory, and if that may be another block's, one
// that says whose.
#if CLUSTER > 1
typedef u64 Place;
#else
typedef u32 Place;
#endif
__device__ __forceinline__ Place place_of(u32 address) {
#if CLUSTER > 1
    Place place;
    asm("cvta.shared::cluster.u64 %0, %1;" : "=l"(place) : "l"(static_cast<u64>(address)));
    return place;
#else
    return address;
#endif
}

// A state and its tag, read and written at once.
__device__ __forceinline__ u64 look(u32 from) {
    u64 both;
    asm volatile("ld." RELAXED_HERE ".b64 %0, [%1];" : "=l"(both) : "r"(from));
    return both;
}
__device__ __forceinline__ void hand(Place to, float state, u32 tag) {
    u64 both = static_cast<u64>(tag) << 32 | __float_as_uint(state);
#if CLUSTER > 1
    asm volatile("st.relaxed.cluster.b64 [%0], %1;" ::"l"(to), "l"(both));
#else
    asm volatile("st." RELAXED ".b64 [%0], %1;" ::"r"(to), "l"(both));
#endif
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
// By these clusters do.
__device__ __forceinline__ u32 look_far(const u32* from) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ void announce_far(u32* to, u32 v) {
    asm volatile("fence.acq_rel.gpu; st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v)
                 : "memory");
}
// What another cluster may have written.
__device__ __forceinline__ float read_far(const float* from) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
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
// A value of which the compiler does not know whence it comes.
__device__ __forceinline__ int unknown(int v) {
    asm volatile("" : "+r"(v));
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

    // Where the numbers of a sequence begin, from a channel or state on.
    __device__ __forceinline__ static const char* place(const void* base, i64 row_at, i64 first_token,
                                                        int first) {
        return static_cast<const char*>(base) + (row_at + first_token * TOKEN + first) * BYTES<KIND>;
    }
    // Of `rows` tokens from one on, of which `count` numbers exist; FULL, if that is all.
    template <bool FULL>
    __device__ __forceinline__ static void fetch(char* to, const char* sequence, u32 token, int rows,
                                                 int count, int lane) {
        const char* from = sequence + static_cast<u64>(token) * STEP;
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

// B or C of a tile; lanes of different tiles read at the same time: from different banks.
struct Tile {
    float of[STATES][PITCH], padding[4];
};
// A warp's part of a task.
struct Piece {
    u32 segment, task;
    int rows;  // tokens that exist; 0: none
};

struct WarpShared {
    Tile B[TILES], C[TILES];
    char x[CopiedX::SIZE], delta[CopiedDelta::SIZE], z[HAS_Z ? CopiedZ::SIZE : 16];
    char B_raw[CopiedB::SIZE], C_raw[CopiedC::SIZE];
    Piece piece[2];  // this one and the next, by turns
    u32 round, padding;
};

// Tasks of one group that a cluster has.
struct Segment {
    u32 first, end;  // tasks
    int group;
    u32 row;
    const char *x, *delta, *B, *C, *z;  // of the group's sequence
    i64 y;                              // where its outputs begin, in elements
};

struct alignas(16) Shared {
    WarpShared warp[WARPS];
    u64 before[SQUADS][2][FIELD];        // the state before a squad's task, in even and odd rounds
    u64 between[WARPS - SQUADS][FIELD];  // and between its warps
    Segment segment[SEGMENTS];
    float rates[SEGMENTS][FIELD];
    float bias[SEGMENTS][COLUMNS], scale[SEGMENTS][COLUMNS], skip[SEGMENTS][COLUMNS];
    float low[SEGMENTS][COLUMNS];
    u32 doubtful;     // whether any of the limits before the softplus is
    u32 segments;     // of the cluster
    u32 rank;         // of the block in its cluster
    u32 done[WARPS];  // rounds of which a warp needs nothing any more
};

// Shuffled: what threads know anyway is otherwise asked for again and again, in the loop over states.
__device__ __forceinline__ int number_of_lane() {
    int lane = unknown(threadIdx.x % 32);
    return __shfl_sync(~0u, lane, lane);
}
__device__ __forceinline__ int number_of_warp() {
    return __shfl_sync(~0u, unknown(threadIdx.x / 32), 0);
}

// ---- what a block works on ----------------------------------------------------------------------

struct Block {
    const Parameters& p;
    Shared& shared;
    int length;  // of the sequences
    u32 tasks;   // of a group
    int lane, warp;

    __device__ __forceinline__ Block(const Parameters& given, Shared& block)
        : p(given), shared(block) {
        length = static_cast<int>(ENDS ? end_at<ENDS>(p.ends, blockIdx.y + 1) -
                                             end_at<ENDS>(p.ends, blockIdx.y)
                                       : p.length);
        tasks = (static_cast<u32>(length) + TASK - 1) / TASK;
        lane = number_of_lane(), warp = number_of_warp();
    }
    __device__ __forceinline__ int rows_from(u32 token, int most) const {
        int left = length - static_cast<int>(token);
        return max(0, min(left, most));
    }
    __device__ __forceinline__ Sequence sequence_of(u32 row) const {
        return {row, ENDS ? 0 : row, ENDS ? end_at<ENDS>(p.ends, row) : 0, length};
    }
    // How many of a group's channels exist.
    __device__ __forceinline__ static int count_of(int group) {
        return min(COLUMNS, CHANNELS - group * COLUMNS);
    }
    __device__ __forceinline__ static i64 state_at(u32 row, int channel, int n) {
        return (static_cast<i64>(row) * CHANNELS + channel) * STATES + n;
    }
    // Of all clusters, for `arrived`.
    __device__ __forceinline__ static u32 cluster() {
        return (blockIdx.y * gridDim.x + blockIdx.x) / CLUSTER;
    }

    // The cluster's part of the line, by all threads of the block.
    __device__ __forceinline__ void divide() const {
        u32 clusters = gridDim.x / CLUSTER, me = blockIdx.x / CLUSTER;
        u64 line = static_cast<u64>(ENDS ? 1 : p.rows) * GROUPS * tasks;
        u64 part = (line + clusters - 1) / clusters, from = min(me * part, line);
        u64 to = min(from + part, line);
        u64 highest = (to - 1) / tasks, lowest = from / tasks;
        u32 segments = from < to ? static_cast<u32>(highest - lowest) + 1 : 0;
        if (threadIdx.x == 0)
            shared.segments = segments, shared.rank = rank_of_block(), shared.doubtful = 0;
        for (u32 i = threadIdx.x; i < segments; i += WARPS * 32) {
            u64 group = highest - i;
            u32 first = group == lowest ? static_cast<u32>(from - lowest * tasks) : 0;
            u32 end = group == highest ? static_cast<u32>(to - highest * tasks) : tasks;
            int number = static_cast<int>(group % GROUPS), channel = number * COLUMNS;
            Sequence row = sequence_of(ENDS ? blockIdx.y : static_cast<u32>(group / GROUPS));
            i64 batch = row.batch;
            shared.segment[i] = {
                first, end, number, static_cast<u32>(row.row),
                CopiedX::place(p.x, batch * p.x_row, row.first, channel),
                CopiedDelta::place(p.delta, batch * p.delta_row, row.first, channel),
                CopiedB::place(p.B, batch * p.B_row, row.first, 0),
                CopiedC::place(p.C, batch * p.C_row, row.first, 0),
                CopiedZ::place(p.z, batch * p.z_row, row.first, channel),
                (batch * p.length + row.first) * CHANNELS + channel};
        }
    }
    // What it knows of its channels.
    __device__ __forceinline__ void prepare() const {
        for (int i = threadIdx.x; i < SQUADS * 2 * FIELD; i += WARPS * 32)
            shared.before[0][0][i] = 0;
        for (int i = threadIdx.x; i < (WARPS - SQUADS) * FIELD; i += WARPS * 32)
            shared.between[0][i] = 0;
        if (threadIdx.x < WARPS) shared.done[threadIdx.x] = 0;
        divide();
        __syncthreads();
        for (u32 i = threadIdx.x; i < shared.segments * FIELD; i += WARPS * 32) {
            const Segment& of = shared.segment[i / FIELD];
            int column = i % COLUMNS, n = i / COLUMNS % STATES, d = of.group * COLUMNS + column;
            float rate = 0.0f;
            if (d < CHANNELS) {
                float scale = DECAY ? p.decay[of.row * p.decay_row + d] : 1.0f;
                // A = -inf forgets at once, but a frozen or padded token must not make it NaN.
                rate = max_or_nan(p.A[static_cast<i64>(d) * STATES + n] * scale * LOG2E, -3e38f);
            }
            shared.rates[0][i] = rate;
        }
        for (u32 i = warp; i < shared.segments * COLUMNS; i += WARPS) {
            const Segment& of = shared.segment[i / COLUMNS];
            int c = i % COLUMNS, d = min(of.group * COLUMNS + c, CHANNELS - 1);
            float scale = SCALE ? p.scale[of.row * p.scale_row + d] : 1.0f;
            float floor = FLOOR ? p.floor[of.row * p.floor_row + d] : 0.0f;
            Limit limit = LIMITS ? limit_of<32>(scale, floor, lane) : Limit{floor, floor};
            if (LIMITS && limit.doubtful()) shared.doubtful = 1;
            shared.low[0][i] = limit.low, shared.scale[0][i] = scale;
            shared.bias[0][i] = HAS_BIAS ? number_at<BIAS_KIND>(p.bias, d) : 0.0f;
            shared.skip[0][i] = HAS_SKIP ? number_at<SKIP_KIND>(p.skip, d) : 0.0f;
        }
        meet();
    }
    // A sequence without tokens ends as it begins.
    __device__ __forceinline__ void keep_states() const {
        for (u32 i = blockIdx.x * WARPS * 32 + threadIdx.x; i < CHANNELS * STATES;
             i += gridDim.x * WARPS * 32) {
            i64 at = state_at(blockIdx.y, 0, 0) + i;
            p.final[at] = INITIAL ? p.initial[at] : 0.0f;
        }
    }
};

// ---- the scan -----------------------------------------------------------------------------------

struct Runner {
    const Block& of;
    int warp, squad, place;  // place: in its squad
    WarpShared& mine;
    int lane, tile, column;

    __device__ __forceinline__ explicit Runner(const Block& block)
        : of(block), warp(number_of_warp()), mine(block.shared.warp[warp]), lane(number_of_lane()) {
        tile = lane / COLUMNS, column = lane % COLUMNS;
        squad = warp / SQUAD, place = warp % SQUAD;
    }
    // The number of the warp's squad among those of the cluster, in the order of time.
    __device__ __forceinline__ u32 worker() const { return squad * CLUSTER + of.shared.rank; }

    // What a warp needs again behind the loop over the states lies in shared memory meanwhile:
    // registers are short there.
    __device__ __forceinline__ void keep(const Piece& piece, u32 round) const {
        volatile Piece& to = mine.piece[round & 1];
        if (lane == 0) to.segment = piece.segment, to.task = piece.task, to.rows = piece.rows;
        __syncwarp();
    }
    __device__ __forceinline__ u32 kept_round() const {
        return *const_cast<const volatile u32*>(&mine.round);
    }
    __device__ __forceinline__ Piece kept(u32 round) const {
        const volatile Piece& from = mine.piece[round & 1];
        return {from.segment, from.task, from.rows};
    }

    // The warp's piece of the task so many behind one of the cluster's.
    __device__ __forceinline__ Piece piece_behind(u32 segment, u32 task, u32 steps) const {
        task += steps;
        while (segment < of.shared.segments && task >= of.shared.segment[segment].end) {
            task -= of.shared.segment[segment].end;
            if (++segment < of.shared.segments) task += of.shared.segment[segment].first;
        }
        Piece piece = {segment, task, 0};
        if (segment < of.shared.segments) piece.rows = of.rows_from(first_token(piece), PIECE);
        return piece;
    }
    __device__ __forceinline__ u32 first_token(const Piece& at) const {
        return (at.task * SQUAD + place) * PIECE;
    }
    __device__ __forceinline__ bool is_last_task(const Piece& at) const {
        return at.task + 1 == of.shared.segment[at.segment].end;
    }

    template <bool FULL>
    __device__ __forceinline__ void fetch_some(const Piece& at) const {
        const Segment& of_these = of.shared.segment[at.segment];
        u32 token = first_token(at);
        int count = of.count_of(of_these.group), rows = at.rows;
        CopiedDelta::fetch<FULL>(mine.delta, of_these.delta, token, rows, count, lane);
        CopiedX::fetch<FULL>(mine.x, of_these.x, token, rows, count, lane);
        CopiedB::fetch<FULL>(mine.B_raw, of_these.B, token, rows, STATES, lane);
        CopiedC::fetch<FULL>(mine.C_raw, of_these.C, token, rows, STATES, lane);
    }
    __device__ __forceinline__ void fetch(const Piece& at) const {
        if (EVEN && at.rows == PIECE)
            fetch_some<true>(at);
        else if (at.rows > 0)
            fetch_some<false>(at);
        copies_commit();
    }
    __device__ __forceinline__ void fetch_gate(const Piece& at) const {
        const Segment& of_these = of.shared.segment[at.segment];
        if (HAS_Z && EVEN && at.rows == PIECE)
            CopiedZ::fetch<true>(mine.z, of_these.z, first_token(at), PIECE, COLUMNS, lane);
        else if (HAS_Z && at.rows > 0)
            CopiedZ::fetch<false>(mine.z, of_these.z, first_token(at), at.rows,
                                  of.count_of(of_these.group), lane);
        copies_commit();
    }

    // B or C as floats, the tokens of a state side by side.
    template <typename From, int KIND>
    __device__ __forceinline__ void spread(Tile (&to)[TILES], const char* from) const {
        // Numbers of 16 bits two states at a time, all lanes with the same number of tokens.
        constexpr int PAIRS = STATES / 2, EACH = TILES * STATES * TILE / 64;
        if constexpr (KIND != 0 && EACH % 4 == 0 && EACH > 0 && TILES * PAIRS * (TILE / EACH) == 32) {
            int tile = lane % TILES, pair = lane / TILES % PAIRS, t0 = lane / (TILES * PAIRS) * EACH;
            const char* here = from + tile * From::TILE_BYTES + t0 * From::ROW + pair * 4;
            float(*states)[PITCH] = to[tile].of + 2 * pair;
#pragma unroll
            for (int t = 0; t < EACH; t += 4) {
                u32 both[4];
#pragma unroll
                for (int k = 0; k < 4; k++)
                    both[k] = *reinterpret_cast<const u32*>(here + (t + k) * From::ROW);
#pragma unroll
                for (int n = 0; n < 2; n++)
                    *reinterpret_cast<float4*>(&states[n][t0 + t]) =
                        make_float4(half_of<KIND>(both[0], n), half_of<KIND>(both[1], n),
                                    half_of<KIND>(both[2], n), half_of<KIND>(both[3], n));
            }
            return;
        }
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
                *reinterpret_cast<float4*>(&to[tile].of[n][t]) = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
    }
    // What the tiles of a channel up to a lane's keep of a state, and what they leave behind; of two
    // tiles, what the lane's own does.
    struct Passage {
        float kept, left;
    };
    __device__ __forceinline__ Passage together(float kept, float left) const {
        if (TILES > 2) {
#pragma unroll
            for (int far = COLUMNS; far < 32; far *= 2) {
                float k = __shfl_up_sync(~0u, kept, far), l = __shfl_up_sync(~0u, left, far);
                if (lane >= far) left = fmaf(kept, l, left), kept *= k;
            }
        }
        return {kept, left};
    }

    // Where a warp finds the states before its piece, and where it leaves those behind it.
    struct Baton {
        u32 from;
        Place to;
        u32 tag_in, tag_out;
        // How many rounds whoever is handed the states must have done, where it says how many it has,
        // and how many those were when last looked at.
        u32 enough, done, seen;
    };
    // Waits for the states before the piece and hands those behind it on; gives those before the tile.
    __device__ __forceinline__ float relay(const Baton& baton, const Passage& own, u64 given) const {
        while (!__all_sync(~0u, tag_of(given) == baton.tag_in)) {
            let_others();
            given = look(baton.from);
        }
        float state = state_of(given), behind = fmaf(own.kept, state, own.left);
        if (TILES > 1) {
            float other = __shfl_up_sync(~0u, behind, COLUMNS);
            state = tile > 0 ? other : state;
            if (TILES == 2) behind = fmaf(own.kept, state, own.left);
        }
        if (tile == TILES - 1) hand(baton.to, behind, baton.tag_out);
        return state;
    }

    // The first warp of a segment's first task finds the states here as if they had been handed on.
    __device__ __forceinline__ void start(const Piece& at, u32 from, u32 tag) const {
        const Segment& segment = of.shared.segment[at.segment];
        int d = segment.group * COLUMNS + column;
        bool goes_on = at.task > 0;
        while (goes_on && !__all_sync(~0u, look_far(of.p.arrived + of.cluster() - 1))) let_others();
#pragma unroll 1
        for (int n = 0; n < STATES; n++) {
            float state = 0.0f;
            i64 where = of.state_at(segment.row, d, n);
            if (d < CHANNELS && goes_on)
                state = read_far(of.p.final + where);
            else if (d < CHANNELS && INITIAL)
                state = of.p.initial[where];
            hand(place_of(from + 8 * COLUMNS * n), state, tag);
        }
        __syncwarp();
        if (goes_on && lane == 0) announce_far(of.p.arrived + of.cluster() - 1, 0);
    }
    __device__ __forceinline__ Baton begin(const Piece& at, u32 round) const {
        Shared& shared = of.shared;
        u32 from, to, done, enough = round, tag_in = round + 1, tag_out = round + 1;
        u32 turn = round * WORKERS + worker();  // among all tasks of the cluster
        if (place > 0) {
            from = shared_at(shared.between[warp - squad - 1]) + 8 * column;
        } else {
            from = shared_at(shared.before[squad][round & 1]) + 8 * column, tag_in = turn + 1;
            if (at.task == shared.segment[at.segment].first) start(at, from, tag_in);
        }
        if (place < SQUAD - 1) {
            to = shared_at(shared.between[warp - squad]) + 8 * column;
            done = shared_at(shared.done + warp + 1);
        } else if (!is_last_task(at)) {
            u32 next = turn + 1, its_round = next / WORKERS, its_worker = next % WORKERS;
            u32 its_squad = its_worker / CLUSTER, block = its_worker % CLUSTER;
            to = shared_of(block, shared_at(shared.before[its_squad][its_round & 1]) + 8 * column);
            done = shared_of(block, shared_at(shared.done + its_squad * SQUAD));
            enough = its_round < 2 ? 0 : its_round - 1, tag_out = next + 1;
        } else {
            // The last of the segment: where the warp itself has just looked.
            to = from, done = shared_at(shared.done), enough = 0;
        }
        return {from, place_of(to), tag_in, tag_out, enough, done, look_up(done)};
    }
    // Until whoever is handed the states has taken those that lay there before.
    __device__ __forceinline__ void await(const Baton& baton) const {
        u32 seen = baton.seen;
        while (!__all_sync(~0u, seen >= baton.enough)) {
            let_others();
            seen = look_up(baton.done);
        }
    }
    // Of the last piece of a segment, whose states lie where the warp has found the last ones.
    __device__ __forceinline__ void finish(const Piece& at, u32 states) const {
        if (place < SQUAD - 1 || !is_last_task(at)) return;
        const Segment& segment = of.shared.segment[at.segment];
        int d = segment.group * COLUMNS + column;
        if (tile == TILES - 1 && d < CHANNELS)
#pragma unroll 1
            for (int n = 0; n < STATES; n++)
                of.p.final[of.state_at(segment.row, d, n)] = state_of(look(states + 8 * COLUMNS * n));
        __syncwarp();
        if (segment.end < of.tasks && lane == 0) announce_far(of.p.arrived + of.cluster(), 1);
    }
    __device__ __forceinline__ void end(u32 round) const {
        __syncwarp();
        if (lane == 0) announce(shared_at(of.shared.done + warp), round + 1);
    }

    // Where the warp stands among the states.
    struct Walk {
        Baton baton;
        const float *rate, *B, *C;  // of the next state to prepare
    };
    // All of a state that needs no other tile.
    struct Ahead {
        float decay[TILE], write[TILE];
        Passage own;
        u64 given;
    };
    __device__ __forceinline__ void prepare(Ahead& to, Walk& walk, const float (&step)[TILE],
                                            const float (&written)[TILE], float total) const {
        float rate = *walk.rate, b[TILE], left = 0.0f;
        read_square(b, walk.B);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            to.decay[t] = decay_of(step[t], rate);
            to.write[t] = written[t] * b[t];
            left = t ? fmaf(to.decay[t], left, to.write[t]) : to.write[t];
        }
        to.own = together(decay_of(total, rate), left);
        // Not before: the later, the likelier they are there.
        __syncwarp();
        to.given = look(walk.baton.from);
        walk.rate += COLUMNS, walk.B += PITCH;
    }
    // The states of the tile from the one before it, and what they give to y. `meanwhile` the next
    // state is prepared: that needs special-function units, which this does not.
    template <typename Meanwhile>
    __device__ __forceinline__ void advance(const Ahead& ahead, Walk& walk, float (&sum)[TILE],
                                            Meanwhile meanwhile) const {
        float state = relay(walk.baton, ahead.own, ahead.given), c[TILE];
        walk.baton.from += 8 * COLUMNS, walk.baton.to += 8 * COLUMNS;
        read_square(c, walk.C);
        walk.C += PITCH;
        meanwhile();
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            state = fmaf(ahead.decay[t], state, ahead.write[t]);
            sum[t] = fmaf(c[t], state, sum[t]);
        }
    }

    template <bool FULL, bool DOUBTS>
    __device__ __forceinline__ void scan(const Piece& piece, u32 round) const {
        const Parameters& p = of.p;
        Shared& shared = of.shared;
        const Segment& segment = shared.segment[piece.segment];
        Sequence row = of.sequence_of(segment.row);
        int c = piece.segment * COLUMNS + column;
        Lane at(p, row, lane, segment.group * COLUMNS + column, shared.bias[0][c],
                shared.scale[0][c], shared.skip[0][c], shared.low[0][c]);
        int rows = FULL ? TILE : max(0, min(TILE, piece.rows - tile * TILE));
        i64 token = first_token(piece) + tile * TILE;
        Baton baton = begin(piece, round);
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
        if (DOUBTS) at.settle_tile(step, p, row.row, token, rows);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            sum[t] = at.skip[0] * written[0][t];
            written[0][t] *= step[0][t];
            total += step[0][t];
        }
        total = opaque(total);
        __syncwarp();
        fetch(kept(round + 1));
        await(baton);
        Walk walk = {baton, shared.rates[piece.segment] + column, mine.B[tile].of[0],
                     mine.C[tile].of[0]};
        auto prepare_next = [&](Ahead& state) {
            prepare(state, walk, step[0], written[0], total);
        };
        // Two by turns, so that none need be copied.
        Ahead even, odd;
        prepare_next(even);
#pragma unroll 1
        for (int n = 0; n + 2 < STATES; n += 2) {
            advance(even, walk, sum, [&] { prepare_next(odd); });
            advance(odd, walk, sum, [&] { prepare_next(even); });
        }
        if (STATES % 2) {
            advance(even, walk, sum, [] {});
        } else {
            advance(even, walk, sum, [&] { prepare_next(odd); });
            advance(odd, walk, sum, [] {});
        }
        round = kept_round();
        finish(kept(round), walk.baton.from - 8 * FIELD);
        end(round);
        copies_wait();
        __syncwarp();
        Runner(of).store<FULL>(kept(round), sum);
    }
    template <bool FULL>
    __device__ __forceinline__ void store(const Piece& piece, const float (&sum)[TILE]) const {
        const Segment& segment = of.shared.segment[piece.segment];
        Lane at(of.p, of.sequence_of(segment.row), lane, segment.group * COLUMNS + column, 0.0f,
                0.0f, 0.0f, 0.0f);
        int rows = FULL ? TILE : max(0, min(TILE, piece.rows - tile * TILE));
        u32 token = first_token(piece) + tile * TILE;
        char* y = static_cast<char*>(of.p.y) + (segment.y + column) * BYTES<X_KIND> +
                  static_cast<u64>(token) * (CHANNELS * BYTES<X_KIND>);
        const char* z_at = CopiedZ::at(mine.z, tile * TILE, column);
        // All that is read first: what is written could be the same, for all that the compiler knows.
        float out[TILE][1];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            out[t][0] = sum[t];
            if (HAS_Z) {
                float z = widen<Z_KIND>(CopiedZ::read(z_at + t * CopiedZ::ROW));
                out[t][0] *= z * sigmoid(z);
            }
            if (VALID && !at.template open<FULL>(token, t, rows)) out[t][0] = 0.0f;
        }
#pragma unroll
        for (int t = 0; t < TILE; t++)
            ::store<X_KIND, FULL && EVEN>(y + t * CHANNELS * BYTES<X_KIND>, out[t],
                                          FULL || t < rows ? at.count : 0);
    }

    // A piece without tokens.
    __device__ __forceinline__ void pass_on(const Piece& piece, u32 round) const {
        Baton baton = begin(piece, round);
        await(baton);
#pragma unroll 1
        for (int n = 0; n < STATES; n++) {
            relay(baton, {1.0f, 0.0f}, look(baton.from));
            baton.from += 8 * COLUMNS, baton.to += 8 * COLUMNS;
        }
        finish(piece, baton.from - 8 * FIELD);
        end(round);
    }

    __device__ __forceinline__ void run() const {
        if (of.shared.segments == 0) return;
        Piece piece = piece_behind(0, of.shared.segment[0].first, worker());
        u32 round = 0;
        fetch(piece);
        fetch_gate(piece);
        keep(piece, round);
#pragma unroll 1
        while (piece.segment < of.shared.segments) {
            keep(piece_behind(piece.segment, piece.task, WORKERS), round + 1);
            if (lane == 0) *const_cast<volatile u32*>(&mine.round) = round;
            copies_wait();
            __syncwarp();
            Runner me(of);
            if (piece.rows == PIECE && !(LIMITS && of.shared.doubtful)) {
                me.scan<true, false>(piece, round);
            } else if (piece.rows > 0) {
                me.scan<false, LIMITS>(piece, round);
            } else {
                me.fetch(kept(round + 1));
                me.pass_on(piece, round);
            }
            __syncwarp();
            round = kept_round() + 1;
            piece = kept(round);
            Runner(of).fetch_gate(piece);
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
    if (ENDS && block.tasks == 0) {
        block.keep_states();
        return;
    }
    block.prepare();
    Runner(block).run();
    meet();  // what is handed on to a block must find it there
}
