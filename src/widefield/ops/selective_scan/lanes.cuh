// What the kernels have in common in which a lane walks through its own channels: how it reads and
// writes them, what it makes of Δ and x, and how B and C of a tile come into shared memory. For every
// file that includes this behind numbers.cuh, with its struct Parameters:
//   X_KIND DELTA_KIND B_KIND C_KIND Z_KIND SKIP_KIND BIAS_KIND   kinds of numbers
//   X_TOKEN DELTA_TOKEN B_TOKEN C_TOKEN Z_TOKEN   strides from token to token, in elements: known
//             here, they cost no instructions
//   CHANNELS  of a row
//   STATES    any number
//   PER_LANE  channels a lane: 1 or 2
//   TILE      tokens: 4, 8 or 16
//   HAS_SKIP HAS_Z HAS_BIAS SOFTPLUS FLOOR SCALE VALID  0 or 1
//   WIDE      1: a lane's two channels can be read and written at once
//   EVEN      all channels of all warps exist
//   LIMITS    what is below a floor is told by limits of what Δ is made of, see numbers.cuh

constexpr int SPAN = 32 * PER_LANE;        // channels of a warp
constexpr int SQUARE = STATES * TILE;      // B or C of a tile
constexpr int LOADS = (SQUARE + 31) / 32;  // numbers of B or C that a lane fetches

static_assert(TILE % 4 == 0, "tiles do not fit");

__device__ __forceinline__ void prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// A sequence: its row of states and plans, its row of the tensors, its first token there.
struct Sequence {
    i64 row, batch, first, length;
};

__device__ __forceinline__ int rows_of(i64 left) {
    return left < 0 ? 0 : left < TILE ? static_cast<int>(left) : TILE;
}

// A lane's numbers of one token, as they lie in memory.
template <int KIND>
struct Raw {
    u32 word[KIND == 0 ? PER_LANE : 1];

    template <bool SURE>
    __device__ __forceinline__ void load(const void* from, int count) {
#pragma unroll
        for (u32& w : word) w = 0;
        if (PER_LANE == 2 && WIDE) {
            if (!SURE && count <= 0) return;
            if (KIND == 0) {
                uint2 both = *static_cast<const uint2*>(from);
                word[0] = both.x, word[PER_LANE - 1] = both.y;
            } else {
                word[0] = *static_cast<const u32*>(from);
            }
            return;
        }
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) {
            if (!SURE && c >= count) continue;
            if (KIND == 0)
                word[c] = static_cast<const u32*>(from)[c];
            else
                word[0] |= static_cast<u32>(static_cast<const u16*>(from)[c]) << 16 * c;
        }
    }
    __device__ __forceinline__ float at(int c) const {
        if (KIND == 0) return __uint_as_float(word[c]);
        return half_of<KIND>(word[0], c);
    }
};

template <int KIND, bool SURE>
__device__ __forceinline__ void store(void* to, const float (&v)[PER_LANE], int count) {
    if (PER_LANE == 2 && WIDE) {
        if (!SURE && count <= 0) return;
        if (KIND == 0)
            *static_cast<float2*>(to) = make_float2(v[0], v[PER_LANE - 1]);
        else
            *static_cast<u32*>(to) = narrow<KIND == 1 ? 1 : 2>(v[0], v[PER_LANE - 1]);
        return;
    }
#pragma unroll
    for (int c = 0; c < PER_LANE; c++) {
        if (!SURE && c >= count) continue;
        if (KIND == 0)
            static_cast<float*>(to)[c] = v[c];
        else
            static_cast<u16*>(to)[c] = static_cast<u16>(narrow<KIND == 1 ? 1 : 2>(v[c], 0.0f));
    }
}

// Into the level-2 cache, sector by sector, the lanes by turns.
template <int TOKENS, int SECTORS>
__device__ __forceinline__ void ask_for(const char* from, i64 step, i64 tokens, int lane, int numbers,
                                        int per_sector) {
#pragma unroll
    for (int i = 0; i < TOKENS * SECTORS; i += 32) {
        int t = (i + lane) / SECTORS, sector = (i + lane) % SECTORS;
        if (t < TOKENS && t < tokens && (EVEN || sector * per_sector < numbers))
            prefetch(from + t * step + sector * 32);
    }
}

// Where a lane's numbers of a tensor lie.
template <int KIND, i64 TOKEN>
struct Stream {
    static constexpr i64 STEP = TOKEN * BYTES<KIND>;
    const char* from;  // of the row's first token

    __device__ __forceinline__ void place(const void* base, i64 row_at, i64 first, int channel) {
        from = static_cast<const char*>(base) + (row_at + first * TOKEN + channel) * BYTES<KIND>;
    }
    // Ask for TOKENS of the warp's rows, as far as they lie before `end`.
    template <int TOKENS>
    __device__ __forceinline__ void ask(i64 token, i64 end, int lane, int channel) const {
        constexpr int PER_SECTOR = 32 / BYTES<KIND>;
        ask_for<TOKENS, SPAN / PER_SECTOR>(from - lane * PER_LANE * BYTES<KIND> + token * STEP, STEP,
                                           end - token, lane,
                                           CHANNELS - channel + lane * PER_LANE, PER_SECTOR);
    }
    template <bool FULL>
    __device__ __forceinline__ void load(Raw<KIND> (&to)[TILE], i64 token, int rows,
                                         int count) const {
        const char* here = from + token * STEP;
#pragma unroll
        for (int t = 0; t < TILE; t++)
            to[t].template load<FULL && EVEN>(here + t * STEP, FULL || t < rows ? count : 0);
    }
};

__device__ __forceinline__ void read_column(float (&to)[PER_LANE], const float* from) {
    if (PER_LANE == 2) {
        float2 v = *reinterpret_cast<const float2*>(from);
        to[0] = v.x, to[PER_LANE - 1] = v.y;
    } else {
        to[0] = *from;
    }
}

__device__ __forceinline__ void write_column(float* to, const float (&v)[PER_LANE]) {
    if (PER_LANE == 2)
        *reinterpret_cast<float2*>(to) = make_float2(v[0], v[PER_LANE - 1]);
    else
        *to = v[0];
}

__device__ __forceinline__ void read_square(float (&to)[TILE], const float* from) {
#pragma unroll
    for (int t = 0; t < TILE; t += 4) {
        float4 v = *reinterpret_cast<const float4*>(from + t);
        to[t] = v.x, to[t + 1] = v.y, to[t + 2] = v.z, to[t + 3] = v.w;
    }
}

// B or C of a tile, on its way to shared memory.
template <int KIND, i64 TOKEN>
struct Projection {
    static constexpr i64 STEP = TOKEN * BYTES<KIND>;
    const char* from;
    u32 number[LOADS];

    __device__ __forceinline__ void place(const void* base, i64 row_at, i64 first) {
        from = static_cast<const char*>(base) + (row_at + first * TOKEN) * BYTES<KIND>;
    }
    template <int TOKENS>
    __device__ __forceinline__ void ask(i64 token, i64 end, int lane) const {
        constexpr int SECTORS = (STATES * BYTES<KIND> + 31) / 32;
        ask_for<TOKENS, SECTORS>(from + token * STEP, STEP, end - token, lane, STATES,
                                 32 / BYTES<KIND>);
    }
    template <bool FULL>
    __device__ __forceinline__ void load(i64 token, int rows, int lane) {
        const char* here = from + token * STEP;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            int t = (lane + 32 * i) / STATES, n = (lane + 32 * i) % STATES;
            const char* at = here + t * STEP + n * BYTES<KIND>;
            number[i] = 0;
            if ((!FULL && t >= rows) || t >= TILE) continue;
            number[i] = KIND == 0 ? *reinterpret_cast<const u32*>(at)
                                  : *reinterpret_cast<const u16*>(at);
        }
    }
    __device__ __forceinline__ void spread(float* to, int lane) const {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            int t = (lane + 32 * i) / STATES, n = (lane + 32 * i) % STATES;
            if (t < TILE) to[n * TILE + t] = widen<KIND>(number[i]);
        }
    }
};

// Which numbers of a tile are frozen, of those that are close to a limit.
__device__ SELDOM u32 settle(const Parameters& p, i64 row, int channel, const char* delta, int rows,
                             float limit, float second) {
    u32 frozen = 0;
#pragma unroll 1
    for (int i = 0; i < rows * PER_LANE; i++) {
        int t = i / PER_LANE, k = i % PER_LANE, d = channel + k;
        if (d >= CHANNELS) continue;
        float v = number_at<DELTA_KIND>(delta, t * DELTA_TOKEN + k);
        if (HAS_BIAS) v += number_at<BIAS_KIND>(p.bias, d);
        if (!close_above(k ? second : limit, v)) continue;
        float scale = SCALE ? p.scale[row * p.scale_row + d] : 1.0f;
        if (below_floor(v, scale, p.floor[row * p.floor_row + d])) frozen |= 1u << i;
    }
    return frozen;
}

// What a lane knows of its channels, and what both kernels make of Δ and x.
struct Lane {
    int lane, channel, count;  // the first of its channels, and how many of them exist
    float bias[PER_LANE], scale[PER_LANE], skip[PER_LANE];
    float floor[PER_LANE];  // or LIMITS: the limit before the softplus
    bool doubtful;          // LIMITS: any of them
    Stream<X_KIND, X_TOKEN> x;
    Stream<DELTA_KIND, DELTA_TOKEN> delta;
    Stream<Z_KIND, Z_TOKEN> z;
    const u8* valid;
    i64 valid_step;

    // `warp_channel` is the first of the warp's.
    __device__ __forceinline__ Lane(const Parameters& p, const Sequence& row, int warp_channel) {
        lane = threadIdx.x % 32;
        channel = warp_channel + lane * PER_LANE;
        count = EVEN ? PER_LANE : max(0, min(PER_LANE, CHANNELS - channel));
        x.place(p.x, row.batch * p.x_row, row.first, channel);
        delta.place(p.delta, row.batch * p.delta_row, row.first, channel);
        if (HAS_Z) z.place(p.z, row.batch * p.z_row, row.first, channel);
        if (VALID) valid = p.valid + row.batch * p.valid_row;
        valid_step = VALID ? p.valid_token : 0;
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) {
            int d = channel + c;
            bool here = c < count;
            bias[c] = HAS_BIAS && here ? number_at<BIAS_KIND>(p.bias, d) : 0.0f;
            scale[c] = SCALE && here ? p.scale[row.row * p.scale_row + d] : 1.0f;
            skip[c] = HAS_SKIP && here ? number_at<SKIP_KIND>(p.skip, d) : 0.0f;
        }
    }

    // The same of a lane with one channel of which all is known.
    __device__ __forceinline__ Lane(const Parameters& p, const Sequence& row, int number, int d,
                                    float its_bias, float its_scale, float its_skip,
                                    float its_floor) {
        lane = number, channel = d;
        count = EVEN ? PER_LANE : max(0, min(PER_LANE, CHANNELS - channel));
        delta.place(p.delta, row.batch * p.delta_row, row.first, channel);
        if (VALID) valid = p.valid + row.batch * p.valid_row;
        valid_step = VALID ? p.valid_token : 0;
        bias[0] = its_bias, scale[0] = its_scale, skip[0] = its_skip, floor[0] = its_floor;
    }

    // Whether there is a token t in the tile and it is no padding.
    template <bool FULL>
    __device__ __forceinline__ bool open(i64 token, int t, int rows) const {
        return (FULL || t < rows) && (!VALID || valid[(token + t) * valid_step]);
    }
    // Δ, 0 where it is frozen; `near` if `decide` must see to it.
    __device__ __forceinline__ float step_of(float v, int c, bool& near) const {
        float step = SOFTPLUS ? softplus(v) : v;
        if (SCALE) step *= scale[c];
        if (!FLOOR) return step;
        if (!LIMITS) near |= SOFTPLUS && fabsf(step - floor[c]) <= 1e-5f * fabsf(floor[c]);
        return (LIMITS ? v : step) < floor[c] ? 0.0f : step;
    }
    // Whether a step that `make` made 0 was frozen. What softplus rounds to 0 has no slope, either.
    __device__ __forceinline__ bool froze(float v, int c, float step) const {
        if (!FLOOR) return false;
        return SOFTPLUS ? step == 0.0f : v * scale[c] < floor[c];
    }
    // Δ and x of a tile; both 0 for padding, which can hold anything.
    template <bool FULL>
    __device__ __forceinline__ void make(float (&step)[PER_LANE][TILE],
                                         float (&value)[PER_LANE][TILE],
                                         const Raw<DELTA_KIND> (&raw)[TILE],
                                         const Raw<X_KIND> (&x)[TILE], i64 token, int rows) const {
        bool near = false;
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            bool is_open = open<FULL>(token, t, rows);
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                step[k][t] = is_open ? step_of(raw[t].at(k) + bias[k], k, near) : 0.0f;
                value[k][t] = VALID && !is_open ? 0.0f : x[t].at(k);
            }
        }
        if (near) decide<FULL>(step, raw, token, rows);
    }
    // Freeze what torch would freeze.
    template <bool FULL>
    __device__ __forceinline__ void decide(float (&step)[PER_LANE][TILE],
                                           const Raw<DELTA_KIND> (&raw)[TILE], i64 token,
                                           int rows) const {
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) {
                if (!open<FULL>(token, t, rows)) continue;
                float v = raw[t].at(k) + bias[k], exact = softplus(v);
                if (SCALE) exact *= scale[k];
                step[k][t] = below_floor(v, scale[k], floor[k]) ? 0.0f : exact;
            }
    }
    // The same in a forward with doubtful limits.
    __device__ __forceinline__ void settle_tile(float (&step)[PER_LANE][TILE], const Parameters& p,
                                                i64 row, i64 token, int rows) const {
        u32 frozen = settle(p, row, channel, delta.from + token * delta.STEP, rows, floor[0],
                            floor[PER_LANE - 1]);
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int k = 0; k < PER_LANE; k++)
                if (frozen >> (t * PER_LANE + k) & 1) step[k][t] = 0.0f;
    }
};
