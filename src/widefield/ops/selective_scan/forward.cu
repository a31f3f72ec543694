// The selective scan's forward, compiled at run time by _nvrtc.py for one set of the macros below.
//
// A block owns CHANNELS channels of one row and walks through all of its tokens in tiles of 32.
// Three kinds of warps share the work:
//
// - Consumers advance the states. GROUP lanes share a channel, each lane keeps STATES / GROUP
//   states in registers. They do little else: one of them has a scheduler nearly to itself, so
//   that whatever it does besides makes every token longer.
// - Producers take the tiles in turn. They read x, Δ, B and C, make softplus, scale and floor, and
//   leave Δ, Δ·x, B and C in shared memory, in the order in which consumers read them.
// - Finishers take the tiles in turn, too. They add up what is left of the sums over the states,
//   add the skip, gate and store y.
//
// Three mbarriers a buffer hand it round: `full` to the consumers, `done` to a finisher, `free`
// back to a producer.
//
// Kinds of numbers: 0 float, 1 bfloat16, 2 half.
//   X_KIND DELTA_KIND B_KIND C_KIND Z_KIND SKIP_KIND BIAS_KIND
//   STATES    8, 16 or 32
//   GROUP     8 or 16 lanes a channel
//   CONSUMERS how many warps, for each of TURNS; PRODUCERS, FINISHERS: which warps, as bits
//   SLOTS     buffers
//   TENSOR    1: sums over the states on tensor cores, for bfloat16
//   TURNS     how many warps take turns along the tokens of the same channels; for TENSOR
//   STAGES    how often lanes exchange sums before finishers add up the rest: 0, 1 or 3
//   HAS_SKIP HAS_Z HAS_BIAS SOFTPLUS FLOOR SCALE DECAY VALID INITIAL  0 or 1
//   ENDS      where the row's sequences end: 0 there is one, 1 as int, 2 as long long
//   WIDE      1: rows of x, Δ, z and y can be read four numbers at a time
//   WIDE_BC   1: rows of B and C can be read 16 bytes at a time
//   EXACT     1: softplus and gate to float32's last places
//   WARPS SHARED  as launched: warps of a block, bytes of its shared memory

#include "numbers.cuh"

__device__ constexpr int count_bits(u32 set) { return set ? (set & 1) + count_bits(set >> 1) : 0; }
constexpr int PRODUCER_COUNT = count_bits(PRODUCERS);
constexpr int FINISHER_COUNT = count_bits(FINISHERS);

constexpr int TILE = 32;  // tokens
constexpr int BLOCK = 8;  // tokens that consumers sum up together
constexpr int PER_LANE = STATES / GROUP;
constexpr int PER_WARP = 32 / GROUP;  // channels
constexpr int CHANNELS = CONSUMERS * PER_WARP;
constexpr int QUADS = CHANNELS / 4;  // pieces of four channels in a row of a tile
constexpr int STEPS = 4 / PER_LANE;  // tokens in one 16-byte vector of B or C

// A buffer, in floats. The paddings spread what a warp writes at once over the banks.
// PAIRED: Δ and Δ·x of a token lie side by side, so that a producer stores both at once and a
// consumer reads as much at a time as otherwise, where all Δ come first, then all Δ·x. Faster where
// one producer's scheduler is the busiest, slower where warps take turns.
constexpr bool PAIRED = TENSOR && TURNS == 1;
constexpr int TOKEN_PITCH = PAIRED ? 2 : 1;
constexpr int DELTA_PITCH = TILE * TOKEN_PITCH + 4;
constexpr int BC_PITCH = GROUP * 4 + 4;
constexpr int BC_FOUR = 32;  // TENSOR: four tokens, in bfloat16
constexpr int DELTA_SIZE = CHANNELS * DELTA_PITCH + (CHANNELS - 1) / 8 * 8;
constexpr int BC_SIZE = TILE / STEPS * BC_PITCH;
constexpr int PARTS = TENSOR ? 2 : STAGES == 3 ? 1 : GROUP >> STAGES;  // sums that finishers add up
constexpr int SUM_PITCH = TENSOR && CHANNELS % 8 == 0 ? CHANNELS + 4 : CHANNELS;
constexpr int PART_SIZE = TILE * SUM_PITCH + (TENSOR || STAGES == 0 ? 4 : STAGES == 3 ? 0 : 8);
constexpr int WRITTEN_AT = PAIRED ? 1 : DELTA_SIZE;
constexpr int B_AT = PAIRED ? DELTA_SIZE : 2 * DELTA_SIZE;
constexpr int C_AT = B_AT + (TENSOR ? TILE / 4 * BC_FOUR : BC_SIZE);
constexpr int SUM_AT = C_AT + (TENSOR ? TILE / 4 * BC_FOUR : BC_SIZE);
constexpr int X_AT = SUM_AT + PARTS * PART_SIZE;  // TENSOR: x for the finisher, as its lanes read it
constexpr int BUFFER = X_AT + (TENSOR ? QUADS * 64 : 0);
constexpr int TURN = 16;   // tokens of a turn
constexpr int STATE = 64;  // floats that a warp hands to the one with the next turn
constexpr int HANDED = TURNS > 1 ? CONSUMERS * TURNS * STATE : 0;

__device__ constexpr int delta_of(int channel) { return channel * DELTA_PITCH + channel / 8 * 8; }

static_assert(CHANNELS % 4 == 0 && 4 % PER_LANE == 0 && (GROUP == 8 || GROUP == 16),
              "lanes do not fit");

struct Parameters {
    const void *x, *delta, *B, *C, *z, *skip, *bias;
    const float *A, *floor, *scale, *decay, *initial;
    const u8* valid;
    const void* ends;
    void* y;
    float* final;
    i64 x_row, delta_row, B_row, C_row, z_row, valid_row;  // strides in elements
    i64 x_token, delta_token, B_token, C_token, z_token, valid_token;
    i64 length;
    int channels, floor_row, scale_row, decay_row;
};

__device__ __forceinline__ float silu(float z) { return z * sigmoid(z); }

// COUNT numbers as they lie in memory.
template <int KIND, int COUNT>
struct Piece {
    static constexpr int WORDS = COUNT * BYTES<KIND> / 4;
    u32 word[WORDS];

    __device__ __forceinline__ float at(int k) const {
        if (KIND == 0) return __uint_as_float(word[k]);
        if (KIND == 1 && k % 2) return __uint_as_float(word[k / 2] & 0xffff0000u);
        return widen<KIND>(k % 2 ? word[k / 2] >> 16 : word[k / 2] & (KIND == 1 ? ~0u : 0xffffu));
    }

    // As many as `count` says, the others 0; `wide` promises that they are aligned and all there.
    __device__ __forceinline__ void load(const void* from, int count, bool wide) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) word[w] = 0;
        if (wide) {
            if (count > 0) {
                if (WORDS == 4)
                    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(word[0]), "=r"(word[1 % WORDS]), "=r"(word[2 % WORDS]),
                                   "=r"(word[3 % WORDS])
                                 : "l"(from));
                else
                    asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];"
                                 : "=r"(word[0]), "=r"(word[1 % WORDS])
                                 : "l"(from));
            }
            return;
        }
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            if (k >= count) continue;
            if (KIND == 0)
                word[k] = static_cast<const u32*>(from)[k];
            else
                word[k / 2] |= static_cast<u32>(static_cast<const u16*>(from)[k]) << k % 2 * 16;
        }
    }
};

template <int KIND>
__device__ __forceinline__ void store_quad(void* to, const float (&v)[4], int count) {
    if (WIDE) {
        if (count > 0) {
            if (KIND == 0)
                *static_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
            else
                *static_cast<uint2*>(to) =
                    make_uint2(narrow<KIND == 1 ? 1 : 2>(v[0], v[1]),
                               narrow<KIND == 1 ? 1 : 2>(v[2], v[3]));
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k >= count) continue;
        if (KIND == 0)
            static_cast<float*>(to)[k] = v[k];
        else
            static_cast<u16*>(to)[k] = narrow<KIND == 1 ? 1 : 2>(v[k], 0.0f);
    }
}

// A place in shared memory, by its address there: pointers would be made from it again and again.
struct Shared {
    u32 address;

    __device__ __forceinline__ Shared operator+(int floats) const {
        return {address + 4 * static_cast<u32>(floats)};
    }
};

__device__ __forceinline__ Shared shared_start() {
    extern __shared__ __align__(16) float start[];
    Shared place = {static_cast<u32>(__cvta_generic_to_shared(start))};
    asm volatile("" : "+r"(place.address));
    return place;
}

__device__ __forceinline__ void read2(float* to, Shared from) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(to[0]), "=f"(to[1])
                 : "r"(from.address));
}
__device__ __forceinline__ void read4(float* to, Shared from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(from.address));
}
__device__ __forceinline__ void write1(Shared to, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to.address), "f"(v));
}
__device__ __forceinline__ void write2(Shared to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to.address), "f"(a), "f"(b));
}
__device__ __forceinline__ void write4(Shared to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "f"(a), "f"(b),
                 "f"(c), "f"(d));
}

__device__ __forceinline__ void barrier_init(Shared barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier.address), "r"(count)
                 : "memory");
}

// The whole warp arrives, as one.
__device__ __forceinline__ void barrier_arrive(Shared barrier, int lane) {
    __syncwarp();
    asm volatile(
        "{ .reg .pred first; .reg .b64 state; setp.eq.u32 first, %1, 0;"
        " @first mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier.address),
        "r"(lane)
        : "memory");
}

#if __CUDA_ARCH__ >= 900
#define WAIT "try_wait"  // sleeps for a while before it says no
#else
#define WAIT "test_wait"
#endif

__device__ __forceinline__ bool barrier_test(Shared barrier, u32 parity) {
    u32 ready;
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(ready)
        : "r"(barrier.address), "r"(parity));
    return ready != 0;
}

__device__ __forceinline__ void barrier_wait(Shared barrier, u32 parity) {
    u32 ready;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier." WAIT
            ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(ready)
            : "r"(barrier.address), "r"(parity)
            : "memory");
    } while (!__all_sync(~0u, ready != 0));
}

// A number that is kept in its register, not computed again.
__device__ __forceinline__ int opaque(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

// Where a warp stands in the ring of buffers. A wait can only tell a phase of a barrier from the
// one before it: no warp may come to wait for a phase while the one before it is still open.
struct Ring {
    u32 slot, parity;

    __device__ __forceinline__ explicit Ring(u32 first) : slot(first), parity(0) {}
    __device__ __forceinline__ void advance(u32 tiles) {
        slot += tiles;
        if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
    }
};
// The buffers, and behind them their barriers and the limits of Δ.
struct Buffers {
    Shared start;

    __device__ __forceinline__ Shared at(u32 slot) const { return start + slot * BUFFER; }
    __device__ __forceinline__ Shared barrier(int kind, u32 slot) const {
        return start + (SLOTS * BUFFER + 2 * SLOTS * kind) + 2 * slot;
    }
    __device__ __forceinline__ Shared limits() const { return barrier(3, 0) + HANDED; }
    __device__ __forceinline__ Shared full(u32 slot) const { return barrier(0, slot); }
    __device__ __forceinline__ Shared done(u32 slot) const { return barrier(1, slot); }
    __device__ __forceinline__ Shared free(u32 slot) const { return barrier(2, slot); }
    // Where a warp finds the states when its turn comes.
    __device__ __forceinline__ Shared states(int consumer) const {
        return start + (SLOTS * (BUFFER + 6) + consumer * STATE);
    }
};
// So the tile that a producer replaces is its own last one in that buffer, and consumers finish the
// tiles in order.
static_assert(SLOTS % PRODUCER_COUNT == 0 && FINISHER_COUNT <= SLOTS, "a wait would be ambiguous");

constexpr int STRIDE = PRODUCER_COUNT * TILE;  // tokens from one tile of a producer to its next

// The tokens of a block: a row, or where ENDS says so, one sequence of the only row.
struct Tokens {
    i64 row, first, length;  // the row of states and plans; of its tokens, the first in the tensors
    u32 tiles, whole;  // how many, and how many of them have all of their rows

    // Of the tensors; the strides of their rows are 0 where there is one.
    __device__ __forceinline__ i64 at(i64 row_stride, i64 token, i64 token_stride) const {
        return row * row_stride + (first + token) * token_stride;
    }
    __device__ __forceinline__ int rows(u32 tile) const {
        return tile < whole ? TILE : tile == whole ? static_cast<int>(length % TILE) : 0;
    }
};

__device__ __forceinline__ Tokens tokens_of(const Parameters& p, i64 row) {
    i64 first = ENDS ? end_at<ENDS>(p.ends, row) : 0;
    i64 length = ENDS ? end_at<ENDS>(p.ends, row + 1) - first : p.length;
    u32 whole = static_cast<u32>(length / TILE);
    return {row, first, length, whole + (length % TILE != 0), whole};
}

// Where a lane's pieces of a tensor lie: one address for the warp, small offsets for the lane.
template <int KIND, int PIECES>
struct Stream {
    const char* tile;
    i64 advance;
    u32 offset[PIECES];

    __device__ __forceinline__ void place(const void* base, i64 element, i64 token_stride,
                                          int tokens) {
        tile = static_cast<const char*>(base) + element * BYTES<KIND>;
        advance = token_stride * tokens * BYTES<KIND>;
    }
    __device__ __forceinline__ void aim(int i, int token, i64 token_stride, int element) {
        offset[i] = (token * static_cast<u32>(token_stride) + element) * BYTES<KIND>;
    }
};

// One tile of B or C.
template <int KIND>
struct Projection {
    static constexpr int COUNT = 16 / BYTES<KIND>;  // numbers in a piece
    static constexpr int PIECES = STATES / COUNT;   // of a row, and of a lane: 32 rows, 32 lanes
    Piece<KIND, COUNT> piece[PIECES];
    Stream<KIND, PIECES> from;

    __device__ __forceinline__ static int token(int i, int lane) {
        return (lane + 32 * i) / PIECES;
    }
    __device__ __forceinline__ static int state(int i, int lane) {
        return (lane + 32 * i) % PIECES * COUNT;
    }

    __device__ __forceinline__ void place(const void* base, i64 element, i64 stride, int lane) {
        from.place(base, element, stride, STRIDE);
#pragma unroll
        for (int i = 0; i < PIECES; i++) from.aim(i, token(i, lane), stride, state(i, lane));
    }

    template <bool WHOLE>
    __device__ __forceinline__ void load(int rows, int lane) {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            piece[i].load(from.tile + from.offset[i], WHOLE || token(i, lane) < rows ? COUNT : 0,
                          WIDE_BC);
        from.tile += from.advance;
    }

    // TENSOR: as they are.
    __device__ __forceinline__ void copy(Shared to) const {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            write4(to + i * (TILE / PIECES / 4) * BC_FOUR, __uint_as_float(piece[i].word[0]),
                   __uint_as_float(piece[i].word[1]), __uint_as_float(piece[i].word[2]),
                   __uint_as_float(piece[i].word[3]));
    }

    __device__ __forceinline__ void spread(Shared to, int lane) const {
        constexpr int RUN = PER_LANE;  // states that lie side by side
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int t = token(i, lane);
            Shared row = to + (t / STEPS * BC_PITCH + state(i, lane) / RUN * 4 + t % STEPS * RUN);
#pragma unroll
            for (int k = 0; k < COUNT; k += RUN) {
                Shared here = row + k / RUN * 4;
                if (RUN == 4)
                    write4(here, piece[i].at(k), piece[i].at((k + 1) % COUNT),
                           piece[i].at((k + 2) % COUNT), piece[i].at((k + 3) % COUNT));
                else if (RUN == 2)
                    write2(here, piece[i].at(k), piece[i].at((k + 1) % COUNT));
                else
                    write1(here, piece[i].at(k));
            }
        }
    }
};

// The pieces of four channels that a lane has of a tile.
struct Pieces {
    int lane, first_channel, count;  // the block's channels: where they begin, how many exist
    Tokens tokens;

    __device__ __forceinline__ bool whole(u32 tile) const { return tile < tokens.whole; }

    __device__ __forceinline__ int token(int i) const { return (lane + 32 * i) / QUADS; }
    __device__ __forceinline__ int channel(int i) const { return (lane + 32 * i) % QUADS * 4; }
    // How many of the piece's channels exist, if it lies in the first `rows` rows of the tile.
    __device__ __forceinline__ int present(int i, int rows) const {
        return token(i) < rows ? count - channel(i) : 0;
    }
    // How many to read: where a channel does not exist, `aim` has chosen another one.
    template <bool WHOLE>
    __device__ __forceinline__ int read(int i, int rows) const {
        return WHOLE && WIDE ? 4 : present(i, rows);
    }

    template <int KIND>
    __device__ __forceinline__ void aim(Stream<KIND, QUADS>& stream, const void* base,
                                        i64 row_stride, i64 token_stride, i64 first,
                                        int stride) const {
        stream.place(base, tokens.at(row_stride, first, token_stride) + first_channel, token_stride,
                     stride);
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            stream.aim(i, token(i), token_stride, channel(i) < count ? channel(i) : 0);
    }
    template <typename Get>
    __device__ __forceinline__ void constants(float (&to)[QUADS][4], float absent, Get get) const {
#pragma unroll
        for (int i = 0; i < QUADS; i++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                to[i][k] = channel(i) + k < count ? get(first_channel + channel(i) + k) : absent;
    }
};

// Which tokens of a lane's pieces are there and are no padding.
struct Valid {
    const u8* from;
    i64 token_stride, advance;
    bool given[QUADS];

    __device__ __forceinline__ void place(const Parameters& p, const Pieces& at, i64 first,
                                          int tokens) {
        if (VALID) from = p.valid + at.tokens.at(p.valid_row, first, p.valid_token);
        token_stride = VALID ? p.valid_token : 0;
        advance = token_stride * tokens;
    }
    __device__ __forceinline__ bool token(int t) const { return !VALID || from[t * token_stride]; }
    __device__ __forceinline__ void load(const Pieces& at, int rows) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) given[i] = at.token(i) < rows && token(at.token(i));
        if (VALID) from += advance;
    }
    template <bool WHOLE>
    __device__ __forceinline__ bool open(int i) const {
        return (WHOLE && !VALID) || given[i];
    }
};

// Δ and Δ·x of a token.
__device__ __forceinline__ void write_step(Shared to, float step, float written) {
    if (PAIRED) {
        write2(to, step, written);
    } else {
        write1(to, step);
        write1(to + WRITTEN_AT, written);
    }
}

constexpr bool LIMITS = FLOOR && SOFTPLUS;
// With a floor, producers of paired steps have no registers left for their channels' biases.
constexpr bool BIASES_SHARED = PAIRED && FLOOR && HAS_BIAS;

// The limits of the block's channels: first all low, then all high ones. Where there is no softplus,
// they are the floors. Behind them lie the biases, if they are shared.
__device__ __forceinline__ void find_limits(const Parameters& p, i64 row, int first_channel,
                                            int warp, int lane, Shared to) {
    for (int c = warp; c < CHANNELS; c += WARPS) {
        int d = min(first_channel + c, p.channels - 1);
        float floor = p.floor[row * p.floor_row + d];
        float scale = SCALE ? p.scale[row * p.scale_row + d] : 1.0f;
        Limit limit = LIMITS ? limit_of<32>(scale, floor, lane) : Limit{floor, floor};
        write1(to + c, limit.low);
        write1(to + (CHANNELS + c), limit.high);
        if (BIASES_SHARED) write1(to + (2 * CHANNELS + c), number_at<BIAS_KIND>(p.bias, d));
    }
}

struct Producer {
    Pieces at;
    Stream<X_KIND, QUADS> x_from;
    Stream<DELTA_KIND, QUADS> delta_from;
    float bias[QUADS][4], scale[QUADS][4];
    Shared limits;
    Piece<X_KIND, 4> x[QUADS];
    Piece<DELTA_KIND, 4> delta[QUADS];
    Valid valid;
    Projection<B_KIND> B;
    Projection<C_KIND> C;
    int delta_to[QUADS], B_to, C_to;  // where in a buffer

    __device__ __forceinline__ void place(const Parameters& p, i64 first) {
        int t = C.token(0, at.lane), word = C.state(0, at.lane) / 2;
        B_to = B_AT + t / 4 * BC_FOUR + t % 4 * 8 + word;
        C_to = C_AT + t / 4 * BC_FOUR + t % 4 * 8 + word;
        if (!PAIRED) B_to = opaque(B_to), C_to = opaque(C_to);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            delta_to[i] = opaque(delta_of(at.channel(i)) + at.token(i) * TOKEN_PITCH);
        }
        at.aim(x_from, p.x, p.x_row, p.x_token, first, STRIDE);
        at.aim(delta_from, p.delta, p.delta_row, p.delta_token, first, STRIDE);
        valid.place(p, at, first, STRIDE);
        B.place(p.B, at.tokens.at(p.B_row, first, p.B_token), p.B_token, at.lane);
        C.place(p.C, at.tokens.at(p.C_row, first, p.C_token), p.C_token, at.lane);
        at.constants(bias, 0.0f,
                     [&](int c) { return HAS_BIAS ? number_at<BIAS_KIND>(p.bias, c) : 0.0f; });
        at.constants(scale, 1.0f,
                     [&](int c) { return SCALE ? p.scale[at.tokens.row * p.scale_row + c] : 1.0f; });
    }

    // Whether any of the limits is doubtful.
    __device__ __forceinline__ bool doubts() const {
        bool any = false;
        for (int c = 0; c < (LIMITS ? CHANNELS : 0); c += 4) {
            float low[4], high[4];
            read4(low, limits + c);
            read4(high, limits + (CHANNELS + c));
            for (int k = 0; k < 4; k++) any |= Limit{low[k], high[k]}.doubtful();
        }
        return any;
    }

    // Ask for the next tile, of which `rows` rows exist; all of them, if it is WHOLE.
    template <bool WHOLE>
    __device__ __forceinline__ void load(int rows) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int here = at.read<WHOLE>(i, rows);
            delta[i].load(delta_from.tile + delta_from.offset[i], here, WIDE);
            x[i].load(x_from.tile + x_from.offset[i], here, WIDE);
        }
        B.load<WHOLE>(rows, at.lane);
        C.load<WHOLE>(rows, at.lane);
        valid.load(at, rows);
        delta_from.tile += delta_from.advance;
        x_from.tile += x_from.advance;
    }

    // Leave the tile in shared memory, as consumers read it. Says whether `settle` has to look at it,
    // if it may have to.
    template <bool WHOLE, bool DOUBTS>
    __device__ __forceinline__ bool make(Shared buffer) const {
        bool close = false;
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            float low[4], high[4], added[4];
            if (FLOOR) read4(low, limits + at.channel(i));
            if (BIASES_SHARED) read4(added, limits + (2 * CHANNELS + at.channel(i)));
            if (DOUBTS) read4(high, limits + (CHANNELS + at.channel(i)));
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float v = delta[i].at(k) + (BIASES_SHARED ? added[k] : bias[i][k]);
                float step = step_of(v, i, k, low[k]);
                if (DOUBTS) close |= Limit{low[k], high[k]}.doubts(v);
                step = valid.open<WHOLE>(i) ? step : 0.0f;
                // A row that does not exist was read as zeros; padding can be anything.
                float written = valid.open<!VALID>(i) ? step * x[i].at(k) : 0.0f;
                write_step(buffer + delta_to[i] + k * DELTA_PITCH, step, written);
            }
            if (TENSOR && HAS_SKIP)
                write2(buffer + 2 * at.lane + (X_AT + 64 * i), __uint_as_float(x[i].word[0]),
                       __uint_as_float(x[i].word[1]));
        }
        if (TENSOR) {
            B.copy(buffer + B_to);
            C.copy(buffer + C_to);
        } else {
            B.spread(buffer + B_AT, at.lane);
            C.spread(buffer + C_AT, at.lane);
        }
        return close;
    }

    __device__ __forceinline__ float step_of(float v, int i, int k, float limit) const {
        float step = SOFTPLUS ? softplus(v) : v;
        if (SCALE) step *= scale[i][k];
        return FLOOR && (SOFTPLUS ? v : step) < limit ? 0.0f : step;
    }
};

// Freezes what has been left in a buffer, of the numbers between a low and a high limit.
__device__ __noinline__ void settle(const Parameters& p, i64 row, int first_channel, i64 first,
                                    int lane, Shared buffer, Shared limits) {
    Tokens tokens = tokens_of(p, row);
#pragma unroll 1
    for (int i = lane; i < TILE * CHANNELS; i += 32) {
        int t = i / CHANNELS, c = i % CHANNELS, d = first_channel + c;
        if (d >= p.channels || first + t >= tokens.length) continue;
        i64 token = tokens.at(p.delta_row, first + t, p.delta_token);
        float v = number_at<DELTA_KIND>(p.delta, token + d), low[2], high[2];
        if (HAS_BIAS) v += number_at<BIAS_KIND>(p.bias, d);
        read2(low, limits + c / 2 * 2);
        read2(high, limits + (CHANNELS + c / 2 * 2));
        if (!Limit{c % 2 ? low[1] : low[0], c % 2 ? high[1] : high[0]}.doubts(v)) continue;
        float scale = SCALE ? p.scale[row * p.scale_row + d] : 1.0f;
        if (!below_floor(v, scale, p.floor[row * p.floor_row + d])) continue;
        write_step(buffer + (delta_of(c) + t * TOKEN_PITCH), 0.0f, 0.0f);
    }
}

template <bool DOUBTS>
__device__ __forceinline__ void produce_from(Producer& of, const Parameters& p, int producer,
                                             const Buffers& buffers) {
    const Pieces& at = of.at;
    u32 tiles = at.tokens.tiles;
    Ring at_slot(producer);
#pragma unroll 1
    for (u32 tile = producer; tile < tiles; tile += PRODUCER_COUNT) {
        Shared buffer = buffers.at(at_slot.slot);
        if (tile >= SLOTS) barrier_wait(buffers.free(at_slot.slot), at_slot.parity ^ 1);
        bool close;
        if (!DOUBTS && at.whole(tile))
            close = of.make<true, DOUBTS>(buffer);
        else
            close = of.make<false, DOUBTS>(buffer);
        if (DOUBTS && !__all_sync(~0u, !close))
            settle(p, at.tokens.row, at.first_channel, static_cast<i64>(tile) * TILE, at.lane,
                   buffer, of.limits);
        barrier_arrive(buffers.full(at_slot.slot), at.lane);
        at_slot.advance(PRODUCER_COUNT);
        if (!DOUBTS && at.whole(tile + PRODUCER_COUNT))
            of.load<true>(TILE);
        else
            of.load<false>(at.tokens.rows(tile + PRODUCER_COUNT));
    }
}

__device__ __forceinline__ void produce(const Parameters& p, const Pieces& at, int producer,
                                        const Buffers& buffers) {
    Producer of;
    of.at = at;
    of.limits = buffers.limits();
    of.place(p, static_cast<i64>(producer) * TILE);
    of.load<false>(at.tokens.rows(producer));
    // Two loops, since even an unlikely call in one takes registers.
    if (LIMITS && of.doubts())
        produce_from<true>(of, p, producer, buffers);
    else
        produce_from<false>(of, p, producer, buffers);
}

constexpr bool READS_X = HAS_SKIP && !TENSOR;  // else it is in the buffer

struct Finisher {
    Pieces at;
    Stream<X_KIND, QUADS> x_from, y_to;
    Stream<Z_KIND, QUADS> z_from;
    float skip[QUADS][4];
    Piece<X_KIND, 4> x[QUADS];
    Piece<Z_KIND, 4> z[QUADS];
    Valid valid;
    int sum_from[QUADS];  // where in a buffer

    __device__ __forceinline__ void place(const Parameters& p, i64 first) {
#pragma unroll
        for (int i = 0; i < QUADS; i++)
            sum_from[i] = opaque(at.token(i) * SUM_PITCH + at.channel(i));
        constexpr int tokens = FINISHER_COUNT * TILE;
        at.aim(y_to, p.y, ENDS ? 0 : p.length * p.channels, p.channels, first, tokens);
        if (READS_X) at.aim(x_from, p.x, p.x_row, p.x_token, first, tokens);
        if (HAS_Z) at.aim(z_from, p.z, p.z_row, p.z_token, first, tokens);
        valid.place(p, at, first, tokens);
        at.constants(skip, 0.0f,
                     [&](int c) { return HAS_SKIP ? number_at<SKIP_KIND>(p.skip, c) : 0.0f; });
    }

    template <bool WHOLE>
    __device__ __forceinline__ void load(int rows) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            int here = at.read<WHOLE>(i, rows);
            if (READS_X) x[i].load(x_from.tile + x_from.offset[i], here, WIDE);
            if (HAS_Z) z[i].load(z_from.tile + z_from.offset[i], here, WIDE);
        }
        valid.load(at, rows);
        if (READS_X) x_from.tile += x_from.advance;
        if (HAS_Z) z_from.tile += z_from.advance;
    }

    __device__ __forceinline__ void sum(float (&y)[QUADS][4], Shared buffer) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            if (HAS_SKIP && TENSOR) {
                float words[2];
                read2(words, buffer + 2 * at.lane + (X_AT + 64 * i));
                x[i].word[0] = __float_as_uint(words[0]), x[i].word[1] = __float_as_uint(words[1]);
            }
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                float v[4];
                read4(v, buffer + sum_from[i] + (SUM_AT + part * PART_SIZE));
#pragma unroll
                for (int k = 0; k < 4; k++) y[i][k] = part ? y[i][k] + v[k] : v[k];
            }
        }
    }

    template <bool WHOLE>
    __device__ __forceinline__ void store(float (&y)[QUADS][4], int rows) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (HAS_SKIP) y[i][k] = fmaf(skip[i][k], x[i].at(k), y[i][k]);
                if (HAS_Z) y[i][k] *= silu(z[i].at(k));
                if (!valid.open<!VALID>(i)) y[i][k] = 0.0f;
            }
            store_quad<X_KIND>(const_cast<char*>(y_to.tile) + y_to.offset[i], y[i],
                               WHOLE ? at.count - at.channel(i) : at.present(i, rows));
        }
        y_to.tile += y_to.advance;
    }
};

__device__ __forceinline__ void finish(const Parameters& p, const Pieces& at, int finisher,
                                       const Buffers& buffers) {
    Finisher of;
    of.at = at;
    of.place(p, static_cast<i64>(finisher) * TILE);
    u32 tiles = at.tokens.tiles;
    of.load<false>(at.tokens.rows(finisher));
    Ring at_slot(finisher);
#pragma unroll 1
    for (u32 tile = finisher; tile < tiles; tile += FINISHER_COUNT) {
        float y[QUADS][4];
        barrier_wait(buffers.done(at_slot.slot), at_slot.parity);
        of.sum(y, buffers.at(at_slot.slot));
        barrier_arrive(buffers.free(at_slot.slot), at.lane);
        at_slot.advance(FINISHER_COUNT);
        if (at.whole(tile))
            of.store<true>(y, TILE);
        else
            of.store<false>(y, at.tokens.rows(tile));
        if (at.whole(tile + FINISHER_COUNT))
            of.load<true>(TILE);
        else
            of.load<false>(at.tokens.rows(tile + FINISHER_COUNT));
    }
}

// A consumer warp has its scheduler to itself, so nothing hides a wait but its own other work. All
// that takes long is therefore begun a group of four tokens before it is needed: in the loop below,
// one group is read from shared memory, the decays of the group before it are computed, the group
// before that is advanced, and the sums of three earlier ones move through the exchanges.
constexpr int GROUPS = TILE / 4;

// Four tokens of what a consumer lane reads, but for Δ.
struct Group {
    float written[4], B[4 * PER_LANE], C[4 * PER_LANE];

    __device__ __forceinline__ void read(Shared channel, Shared states, int g) {
        read4(written, channel + WRITTEN_AT + 4 * g);
#pragma unroll
        for (int v = 0; v < PER_LANE; v++) {
            read4(B + 4 * v, states + B_AT + (4 * g / STEPS + v) * BC_PITCH);
            read4(C + 4 * v, states + C_AT + (4 * g / STEPS + v) * BC_PITCH);
        }
    }
};

// Two lanes that differ in one bit hold sums of two tokens: each keeps one token, and gets the
// other lane's part of it.
struct Exchange {
    float kept = 0.0f, received = 0.0f;

    __device__ __forceinline__ void begin(float even, float odd, bool bit, int mask) {
        kept = bit ? odd : even;
        received = __shfl_xor_sync(~0u, bit ? even : odd, mask);
    }
    __device__ __forceinline__ float end() const { return kept + received; }
};

struct Consumer {
    float A[PER_LANE], h[PER_LANE];
    float decay[4 * PER_LANE];  // of the group to advance
    float sum[4];               // of the last group
    Exchange first[2], second[2], third;  // of the groups before it; ended a turn after they begin
    int mine, channel;                    // which lane of its group, which channel of the block
    bool bit0, bit1, bit2;
    int mask0, mask1, mask2;

    __device__ __forceinline__ void place(int lane, int warp) {
        // Lanes 0 and 1 share states, lanes 0 and 2 a channel: shared memory answers both kinds of
        // reads for sixteen lanes at once.
        if (GROUP == 8) {
            mine = (lane >> 1 & 1) | (lane >> 3) << 1;
            channel = (lane & 1) | (lane >> 2 & 1) << 1;
            mask0 = 2, mask1 = 8, mask2 = 16;
        } else {
            mine = lane >> 1;
            channel = lane & 1;
            mask0 = 2, mask1 = 4, mask2 = 8;
        }
        channel += warp * PER_WARP;
        bit0 = mine & 1, bit1 = mine & 2, bit2 = mine & 4;
        for (int k = 0; k < 4; k++) sum[k] = 0.0f;
    }

    __device__ __forceinline__ void decays(float* to, const float* delta) const {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int s = 0; s < PER_LANE; s++) to[k * PER_LANE + s] = decay_of(delta[k], A[s]);
    }

    __device__ __forceinline__ void advance(const Group& of, float* sums) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float total = 0.0f;
#pragma unroll
            for (int s = 0; s < PER_LANE; s++) {
                int i = k * PER_LANE + s;
                h[s] = fmaf(decay[i], h[s], of.written[k] * of.B[i]);
                total = s ? fmaf(of.C[i], h[s], total) : of.C[i] * h[s];
            }
            sums[k] = total;
        }
    }

    // One turn: `of` is advanced unless all tokens are, `delta` belongs to the group behind it, and
    // the sums of the block of tokens that left the exchanges last go to `flushed`.
    template <bool ADVANCE>
    __device__ __forceinline__ void turn(int g, const Group& of, const float* delta,
                                         Shared flushed) {
        if (STAGES == 3) {
            if (g % 2 == 1) flush_block(flushed, (g + 3) % GROUPS / 2);
            if (g % 2 == 0) third.begin(second[0].end(), second[1].end(), bit2, mask2);
            second[g % 2].begin(first[0].end(), first[1].end(), bit1, mask1);
        } else {
            flush_group(flushed, (g + GROUPS - 1 - STAGES) % GROUPS);
        }
        if (STAGES >= 1) {
            first[0].begin(sum[0], sum[1], bit0, mask0);
            first[1].begin(sum[2], sum[3], bit0, mask0);
        }
        if (!ADVANCE) return;
        float ahead[4 * PER_LANE];
        decays(ahead, delta);
        advance(of, sum);
#pragma unroll
        for (int i = 0; i < 4 * PER_LANE; i++) decay[i] = ahead[i];
    }

    // After three exchanges a lane has the whole sum of one of eight tokens, or half of it.
    __device__ __forceinline__ void flush_block(Shared to, int block) const {
        float whole = third.end();
        if (GROUP == 16) whole += __shfl_xor_sync(~0u, whole, 16);
        if (mine < 8) write1(to + (block * BLOCK + mine) * CHANNELS, whole);
    }

    // Before that, it has a part of some of four tokens.
    __device__ __forceinline__ void flush_group(Shared to, int group) const {
        int part = mine >> STAGES, low = mine & ((1 << STAGES) - 1);
        to = to + (part * PART_SIZE + low * CHANNELS) + group * 4 * CHANNELS;
#pragma unroll
        for (int i = 0; i < 4 >> STAGES; i++)
            write1(to + (i << STAGES) * CHANNELS, STAGES ? first[i % 2].end() : sum[i]);
    }
};

// The turn of the next tile in which the last sums of a tile are flushed.
constexpr int LAST_FLUSH = STAGES == 3 ? 3 : STAGES;

// What a consumer has read ahead, and where in a buffer its own numbers lie.
struct Walk {
    int channel_at, states_at, sums_at;
    Group of[2];
    float delta[2][4];

    __device__ __forceinline__ void begin(Consumer& c, Shared buffer) {
        of[0].read(buffer + channel_at, buffer + states_at, 0);
        read4(delta[0], buffer + channel_at);
        read4(delta[1], buffer + channel_at + 4);
        c.decays(c.decay, delta[0]);
    }

    // Groups FROM to TO of a tile in `buffer`. `other` is the tile behind it, where TO is 8, and
    // else the one before it, whose last sums are flushed.
    template <int FROM, int TO, bool ADVANCE>
    __device__ __forceinline__ void turns(Consumer& c, Shared buffer, Shared other) {
#pragma unroll
        for (int g = FROM; g < TO; g++) {
            if (ADVANCE) {
                Shared from = g < GROUPS - 1 ? buffer : other;
                of[(g + 1) % 2].read(from + channel_at, from + states_at, (g + 1) % GROUPS);
                from = g < GROUPS - 2 ? buffer : other;
                read4(delta[g % 2], from + channel_at + (g + 2) % GROUPS * 4);
            }
            c.turn<ADVANCE>(g, of[g % 2], delta[(g + 1) % 2],
                            (g <= LAST_FLUSH ? other : buffer) + sums_at);
        }
    }
};

__device__ __forceinline__ void consume(const Parameters& p, int warp, int lane,
                                        const Tokens& tokens, int first_channel,
                                        const Buffers& buffers) {
    Consumer c;
    c.place(lane, warp);
    int d = first_channel + c.channel;
    bool here = d < p.channels;
    i64 state = (tokens.row * p.channels + d) * STATES + c.mine * PER_LANE;
    float scale = DECAY && here ? p.decay[tokens.row * p.decay_row + d] : 1.0f;
#pragma unroll
    for (int s = 0; s < PER_LANE; s++) {
        float A = here ? p.A[static_cast<i64>(d) * STATES + c.mine * PER_LANE + s] : 0.0f;
        // A = -inf forgets at once, but a frozen or padded token must not make it NaN.
        c.A[s] = max_or_nan(A * scale * LOG2E, -3e38f);
        c.h[s] = INITIAL && here ? p.initial[state + s] : 0.0f;
    }
    u32 tiles = tokens.tiles;
    Walk walk{delta_of(c.channel), c.mine * 4, SUM_AT + c.channel};
    barrier_wait(buffers.full(0), 0);
    Shared buffer = buffers.at(0), handed = buffers.done(0);
    walk.begin(c, buffer);
    walk.turns<0, 6, true>(c, buffer, buffer);
    Ring ahead(0);
    ahead.advance(1);
    u32 tile = 1;
    while (tile < tiles) {
        barrier_wait(buffers.full(ahead.slot), ahead.parity);
        bool on;
        do {
            // What keeps the compiler from mixing the instructions before and behind it, a branch
            // or a barrier, all stands at the end of the loop.
            Shared next = buffers.at(ahead.slot), later = buffers.done(ahead.slot);
            ahead.advance(1);
            tile++;
            walk.turns<6, 8, true>(c, buffer, next);
            walk.turns<0, 2, true>(c, next, buffer);
            bool ready = barrier_test(buffers.full(ahead.slot), ahead.parity);
            walk.turns<2, 6, true>(c, next, buffer);
            on = __all_sync(~0u, ready && tile < tiles);
            barrier_arrive(handed, lane);
            handed = later;
            buffer = next;
        } while (on);
    }
    walk.turns<6, 8, true>(c, buffer, buffer);
    walk.turns<0, LAST_FLUSH + 1, false>(c, buffer, buffer);
    barrier_arrive(handed, lane);
    if (here) {
#pragma unroll
        for (int s = 0; s < PER_LANE; s++) p.final[state + s] = c.h[s];
    }
}

// The same, but C·h is summed over the states on tensor cores, with no exchange between lanes.
//
// A lane keeps two states of one channel: lanes 4g to 4g + 3 have half g % 2 of the states of
// channel g / 2, as lanes have the numbers of a product's first factor. Two tokens go into one
// product, as rows g and g + 8; its second factor is C of four tokens, in columns: of the two halves
// of the states, each. So a quarter of the result is wanted, and lane c has it where its column is
// 2c. Tensor cores cut the states to 11 bits there, which adds little to y's rounding to bfloat16;
// the states themselves stay as they are.
//
// What a lane reads of four tokens; B as pairs of bfloat16, as they lie in memory.
struct Four {
    float steps[8], B[4];  // Δ and Δ·x

    __device__ __forceinline__ float delta(int t) const { return steps[PAIRED ? 2 * t : t]; }
    __device__ __forceinline__ float written(int t) const {
        return steps[PAIRED ? 2 * t + 1 : 4 + t];
    }
    // Half of the steps, of the four tokens that begin at `from`.
    __device__ __forceinline__ void read_half(int half, Shared from) {
        read4(steps + 4 * half, from + half * (PAIRED ? 4 : WRITTEN_AT));
    }
};

__device__ __forceinline__ void multiply(float (&d)[4], float a0, float a1, float a2, float a3,
                                         float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
          "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(0.0f));
}

// Four matrices of 8 x 8 16-bit numbers, of which each lane points to a row: lane 4g + c gets the
// numbers 2c and 2c + 1 of row g of each.
__device__ __forceinline__ void load_matrices(float* to, Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(row.address));
}

__device__ __forceinline__ float of_pair(float pair, int i) {
    u32 bits = __float_as_uint(pair);
    return i ? __uint_as_float(bits & 0xffff0000u) : widen<1>(bits);
}

// Where in a buffer a lane's numbers lie, and its two states.
struct TensorLane {
    int delta_at, B_from, C_from, sum_at;
    bool takes[2][2];  // sums: of which pair of tokens, in even and in odd groups
    float A[2], h[2];

    __device__ __forceinline__ static int half_of(int lane) { return lane / 4 % 2; }
    __device__ __forceinline__ static int channel_of(int lane, int quad) {
        return quad * 4 + lane / 8;
    }

    __device__ __forceinline__ void place(int lane, int quad) {
        int c = lane % 4, half = half_of(lane), channel = channel_of(lane, quad);
        delta_at = delta_of(channel);
        B_from = B_AT + lane / 8 * 8 + half_of(lane % 8 * 4) * 4;
        int column = lane % 8, group = lane / 8;  // that it points to
        C_from = C_AT + group * BC_FOUR + (column / 4 * 2 + column % 2) * 8 +
                 (column / 2 % 2 ^ group % 2) * 4;
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) takes[i][j] = c == 2 * j + (half ^ i);
        int token = 4 * (c % 2 ^ half) + c / 2 * 2;
        sum_at = SUM_AT + half * PART_SIZE + token * SUM_PITCH + channel;
    }

    __device__ __forceinline__ static i64 state_at(const Parameters& p, i64 row, int channel,
                                                   int lane) {
        return (row * p.channels + channel) * STATES + half_of(lane) * 8 + lane % 4 * 2;
    }

    __device__ __forceinline__ void start(const Parameters& p, i64 row, int channel, int lane) {
        bool here = channel < p.channels;
        float scale = DECAY && here ? p.decay[row * p.decay_row + channel] : 1.0f;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            float rate = here ? p.A[state_at(p, 0, channel, lane) + s] : 0.0f;
            A[s] = max_or_nan(rate * scale * LOG2E, -3e38f);
            h[s] = INITIAL && here ? p.initial[state_at(p, row, channel, lane) + s] : 0.0f;
        }
    }

    __device__ __forceinline__ void stop(const Parameters& p, i64 row, int channel,
                                         int lane) const {
        if (channel >= p.channels) return;
#pragma unroll
        for (int s = 0; s < 2; s++) p.final[state_at(p, row, channel, lane) + s] = h[s];
    }
};

struct TensorConsumer : TensorLane {
    float sum[2];
    float decay[2][8], write[2][8];
    Four of[2];
    float C[2][4];  // of four groups each, as pairs of bfloat16

    __device__ __forceinline__ void read(Four& to, Shared buffer, int g) {
        to.read_half(0, buffer + delta_at + 4 * TOKEN_PITCH * g);
        to.read_half(1, buffer + delta_at + 4 * TOKEN_PITCH * g);
        load_matrices(to.B, buffer + B_from + BC_FOUR * g);
        if (g % 4 == 0) load_matrices(C[g / 4], buffer + C_from + BC_FOUR * g);
    }

    // What four tokens leave of the states, and what they add.
    __device__ __forceinline__ void prepare(int g, const Four& from) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            decay[g % 2][i] = decay_of(from.delta(i / 2), A[i % 2]);
            write[g % 2][i] = from.written(i / 2) * of_pair(from.B[i / 2], i % 2);
        }
    }

    __device__ __forceinline__ void advance(int g, float pair, Shared buffer) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float *a = decay[g % 2] + 4 * j, *w = write[g % 2] + 4 * j;
            float first[] = {fmaf(a[0], h[0], w[0]), fmaf(a[1], h[1], w[1])}, y[4];
            h[0] = fmaf(a[2], first[0], w[2]);
            h[1] = fmaf(a[3], first[1], w[3]);
            multiply(y, first[0], h[0], first[1], h[1], of_pair(pair, 0), of_pair(pair, 1));
            bool take = takes[g % 2][j] || (g % 2 == 0 && j == 0);
            sum[0] = take ? y[0] : sum[0];
            sum[1] = take ? y[3] : sum[1];
        }
        if (g % 2 == 0) return;
        write1(buffer + sum_at + g / 2 * BLOCK * SUM_PITCH, sum[0]);
        write1(buffer + sum_at + (g / 2 * BLOCK + 1) * SUM_PITCH, sum[1]);
    }

    __device__ __forceinline__ void begin(Shared buffer) {
        read(of[0], buffer, 0);
        read(of[1], buffer, 1);
        prepare(0, of[0]);
    }

    // Groups FROM to TO of the tile in `buffer`; `next` is the tile behind it. A group is read two
    // turns before it is advanced, its decays are computed one turn before.
    template <int FROM, int TO>
    __device__ __forceinline__ void turns(Shared buffer, Shared next) {
#pragma unroll
        for (int g = FROM; g < TO; g++) {
            float pair = C[g / 4][g % 4];
            read(of[g % 2], g < GROUPS - 2 ? buffer : next, (g + 2) % GROUPS);
            prepare(g + 1, of[(g + 1) % 2]);
            advance(g, pair, buffer);
        }
    }
};

__device__ __forceinline__ void consume_on_tensor_cores(const Parameters& p, int warp, int lane,
                                                        const Tokens& tokens, int first_channel,
                                                        const Buffers& buffers) {
    TensorConsumer c;
    c.place(lane, warp);
    int channel = first_channel + c.channel_of(lane, warp);
    c.start(p, tokens.row, channel, lane);
    u32 tiles = tokens.tiles;
    barrier_wait(buffers.full(0), 0);
    Shared buffer = buffers.at(0), handed = buffers.done(0);
    c.begin(buffer);
    c.turns<0, 6>(buffer, buffer);
    Ring ahead(0);
    ahead.advance(1);
    u32 tile = 1;
    while (tile < tiles) {
        barrier_wait(buffers.full(ahead.slot), ahead.parity);
        bool on;
        do {
            Shared next = buffers.at(ahead.slot), later = buffers.done(ahead.slot);
            ahead.advance(1);
            tile++;
            c.turns<6, 8>(buffer, next);
            c.turns<0, 2>(next, next);
            bool ready = barrier_test(buffers.full(ahead.slot), ahead.parity);
            c.turns<2, 6>(next, next);
            on = __all_sync(~0u, ready && tile < tiles);
            barrier_arrive(handed, lane);
            handed = later;
            buffer = next;
        } while (on);
    }
    c.turns<6, 8>(buffer, buffer);
    barrier_arrive(handed, lane);
    c.stop(p, tokens.row, channel, lane);
}

// Of two warps, one of which waits until the other has arrived. Barrier 0 is the whole block's.
__device__ __forceinline__ void pair_arrive(int barrier) {
    asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void pair_wait(int barrier) {
    asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}

// The same numbers again, but TURNS warps share the channels and take turns of TURN tokens. A warp
// computes what needs no state before it has it, and C·h of its last turn at the same time, so
// that most of what it does is done while other warps advance the states.
struct TurnConsumer : TensorLane {
    float decay[2 * TURN], write[2 * TURN];
    float state[2 * TURN], C[2][4], sums[2];  // of the last turn; C of this one, too
    Four of[2];

    // Its turns are one part of a tile, always the same.
    __device__ __forceinline__ void place(int lane, int quad, int part) {
        TensorLane::place(lane, quad);
        delta_at = opaque(delta_at + part * TURN);
        B_from = opaque(B_from + part * (TURN / 4 * BC_FOUR));
        C_from = opaque(C_from + part * (TURN / 4 * BC_FOUR));
        sum_at = opaque(sum_at + part * (TURN * SUM_PITCH));
        for (int i = 0; i < 2 * TURN; i++) state[i] = 0.0f;
        for (int i = 0; i < 4; i++) C[1][i] = 0.0f;
    }

    __device__ __forceinline__ void read(Shared buffer, int g) {
        of[g % 2].read_half(0, buffer + delta_at + 4 * g);
        load_matrices(of[g % 2].B, buffer + B_from + BC_FOUR * g);
        of[g % 2].read_half(1, buffer + delta_at + 4 * g);
    }

    // What four tokens leave of the states, and what they add.
    __device__ __forceinline__ void prepare(int g) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            decay[8 * g + i] = decay_of(of[g % 2].delta(i / 2), A[i % 2]);
            write[8 * g + i] = of[g % 2].written(i / 2) * of_pair(of[g % 2].B[i / 2], i % 2);
        }
    }

    // C·h of four tokens of the last turn.
    __device__ __forceinline__ void sum(Shared last, int g) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float* h = state + 8 * g + 4 * j;
            float y[4];
            multiply(y, h[0], h[2], h[1], h[3], of_pair(C[1][g], 0), of_pair(C[1][g], 1));
            bool take = takes[g % 2][j] || (g % 2 == 0 && j == 0);
            sums[0] = take ? y[0] : sums[0];
            sums[1] = take ? y[3] : sums[1];
        }
        if (g % 2 == 0) return;
        write1(last + sum_at + g / 2 * BLOCK * SUM_PITCH, sums[0]);
        write1(last + sum_at + (g / 2 * BLOCK + 1) * SUM_PITCH, sums[1]);
    }

    // The next turn, as far as it needs no state, and the sums of the last one.
    __device__ __forceinline__ void begin(Shared buffer, Shared last) {
        read(buffer, 0);
#pragma unroll
        for (int g = 0; g < TURN / 4; g++) {
            if (g + 1 < TURN / 4)
                read(buffer, g + 1);
            else
                load_matrices(C[0], buffer + C_from);
            prepare(g);
            sum(last, g);
        }
    }

    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int i = 0; i < 2 * TURN; i++)
            state[i] = h[i % 2] = fmaf(decay[i], h[i % 2], write[i]);
#pragma unroll
        for (int i = 0; i < 4; i++) C[1][i] = C[0][i];
    }

    __device__ __forceinline__ void end(Shared last) {
#pragma unroll
        for (int g = 0; g < TURN / 4; g++) sum(last, g);
    }
};

__device__ __forceinline__ void consume_in_turns(const Parameters& p, int warp, int lane,
                                                 const Tokens& tokens, int first_channel,
                                                 const Buffers& buffers) {
    TurnConsumer c;
    int quad = warp % CONSUMERS;
    u32 mine = warp / CONSUMERS, next = mine == TURNS - 1 ? 0 : mine + 1;
    c.place(lane, quad, mine % 2);
    int channel = first_channel + c.channel_of(lane, quad);
    c.start(p, tokens.row, channel, lane);
    int given_at = quad * TURNS + mine, taken_at = quad * TURNS + next;
    Shared given = buffers.states(given_at) + opaque(2 * lane);
    Shared taken = buffers.states(taken_at) + opaque(2 * lane);
    auto hand_over = [&] {
        write2(taken, c.h[0], c.h[1]);
        pair_arrive(1 + taken_at);
    };
    if (mine == TURNS - 1) hand_over();
    u32 turns = tokens.tiles * (TILE / TURN);
    Ring at(0);
    at.advance(mine / 2);
    Shared last = buffers.at(at.slot), done = buffers.done(at.slot);
    bool ready = false;
#pragma unroll 1
    for (u32 turn = mine; turn < turns; turn += TURNS) {
        if (!ready) barrier_wait(buffers.full(at.slot), at.parity);
        Shared buffer = buffers.at(at.slot);
        // In the first turn there are no sums yet: what is written is replaced in the second.
        c.begin(buffer, last);
        barrier_arrive(done, turn >= TURNS ? lane : 1);
        last = buffer, done = buffers.done(at.slot);
        at.advance(TURNS / 2);
        do {  // once: without a branch the compiler moves exp2 behind the wait
            pair_wait(1 + given_at);
        } while (p.length < 0);
        read2(c.h, given);
        bool filled = barrier_test(buffers.full(at.slot), at.parity);
        c.advance();
        hand_over();
        ready = __all_sync(~0u, filled);
    }
    if (mine < turns) {
        c.end(last);
        barrier_arrive(done, lane);
    }
    if (turns % TURNS != mine) return;
    pair_wait(1 + given_at);
    read2(c.h, given);
    c.stop(p, tokens.row, channel, lane);
}

// Of an empty sequence.
__device__ __forceinline__ void keep_states(const Parameters& p, i64 row, int first_channel) {
    i64 first = (row * p.channels + first_channel) * STATES;
    int count = min(CHANNELS, p.channels - first_channel) * STATES;
    for (int i = threadIdx.x; i < count; i += WARPS * 32)
        p.final[first + i] = INITIAL ? p.initial[first + i] : 0.0f;
}

static_assert(!TENSOR || (STATES == 16 && GROUP == 8 && X_KIND == 1 && B_KIND == 1 && C_KIND == 1),
              "made for these");
static_assert(TURNS == 1 || (TENSOR && TURNS % 2 == 0 && CONSUMERS * TURNS < 16),
              "turns do not fit");
static_assert(TURNS / 2 < SLOTS, "a warp's last tile would be in the way of its next one");
static_assert(SHARED == SLOTS * (BUFFER * 4 + 3 * 8) + (HANDED + 3 * CHANNELS) * 4,
              "the launch has another size of shared memory");

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    selective_scan_forward(const __grid_constant__ Parameters p) {
    Buffers buffers{shared_start()};
    // From lane 0, so that the compiler knows it to be the same in the whole warp.
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    Tokens tokens = tokens_of(p, blockIdx.y);
    int first_channel = blockIdx.x * CHANNELS;
    if (ENDS && tokens.tiles == 0) {
        keep_states(p, tokens.row, first_channel);
        return;
    }
    if (threadIdx.x < SLOTS) {
        barrier_init(buffers.full(threadIdx.x), 1);
        barrier_init(buffers.done(threadIdx.x), CONSUMERS * (TURNS > 1 ? TILE / TURN : 1));
        barrier_init(buffers.free(threadIdx.x), 1);
    }
    if (FLOOR) find_limits(p, tokens.row, first_channel, warp, lane, buffers.limits());
    __syncthreads();
    if (warp < CONSUMERS * TURNS) {
        if constexpr (TURNS > 1)
            consume_in_turns(p, warp, lane, tokens, first_channel, buffers);
        else if constexpr (TENSOR)
            consume_on_tensor_cores(p, warp, lane, tokens, first_channel, buffers);
        else
            consume(p, warp, lane, tokens, first_channel, buffers);
        return;
    }
    Pieces at{lane, first_channel, min(CHANNELS, p.channels - first_channel), tokens};
    u32 me = 1u << warp;
    if (PRODUCERS & me) produce(p, at, __popc(PRODUCERS & (me - 1)), buffers);
    if (FINISHERS & me) finish(p, at, __popc(FINISHERS & (me - 1)), buffers);
}
