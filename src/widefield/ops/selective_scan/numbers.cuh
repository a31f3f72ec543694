// Numbers as the scans read, make and write them. For every file that includes this:
//   EXACT 1: softplus and gate to float32's last places
// Kinds of numbers: 0 float, 1 bfloat16, 2 half.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;
typedef long long i64;

constexpr float LOG2E = 1.4426950216293335f;          // log2(e), rounded to float32
constexpr float LOG2E_REST = 1.9259629911266175e-8f;  // what that rounding left
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// The GPU's exp2 of numbers up to 0 is too small, by 6e-9 close to 0 and by 2e-8 further off, and
// the products along a sequence add that up. What is added here makes good for most of it; exp2 of it
// alone is still 1.
__device__ __forceinline__ float decay_of(float step, float rate) {
    return exp2_fast(fmaf(step, rate, 1.4e-8f));
}

__device__ __forceinline__ float reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// max that keeps NaN, so that a broken Δ shows.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
}

__device__ __forceinline__ u32 pack_bfloat16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u32 pack_half(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// exp of a number between -100 and 87; the rounding of the product with log2(e) is made good.
__device__ __forceinline__ float exp_of(float v) {
    float product = v * LOG2E;
    if (!EXACT) return exp2_fast(product);
    float rest = fmaf(v, LOG2E_REST, fmaf(v, LOG2E, -product));
    float power = exp2_fast(product);
    return fmaf(power, rest * LN2, power);
}

// log(1 + u) of u from 0 to 1: minimax polynomials of log(1 + u) / u, relative errors 5e-9, 2.2e-7.
__device__ __forceinline__ float log_above_one(float u, float more) {
    constexpr float exact[] = {1.0f,
                               -0.4999990165233612f,
                               0.3332996368408203f,
                               -0.24954134225845337f,
                               0.1967594027519226f,
                               -0.15305593609809875f,
                               0.10603655129671097f,
                               -0.056959524750709534f,
                               0.019851455464959145f,
                               -0.0032440228387713432f};
    constexpr float quick[] = {1.0f,
                               -0.4999817907810211f,
                               0.3328406512737274f,
                               -0.24536865949630737f,
                               0.17847207188606262f,
                               -0.10902288556098938f,
                               0.04498662054538727f,
                               -0.00877894926816225f};
    float p = EXACT ? exact[9] : quick[7];
#pragma unroll
    for (int i = EXACT ? 8 : 6; i >= 0; i--) p = fmaf(p, u, EXACT ? exact[i] : quick[i % 8]);
    return fmaf(p, u, more);
}

__device__ __forceinline__ float softplus(float v) {
    float n = -fabsf(v);
    return log_above_one(exp_of(EXACT ? fmaxf(n, -100.0f) : n), max_or_nan(v, 0.0f));
}

__device__ __forceinline__ float sigmoid(float v) {
    if (EXACT && v < -87.0f) return 0.0f;
    return reciprocal(1.0f + exp_of(-v));
}

// What is seldom called. A kernel can ask for it in line: a call in it, even one that is never made,
// lets the compiler no longer know that the threads of a warp stay together.
#ifndef SELDOM
#define SELDOM __noinline__
#endif

// Whether softplus(v) * scale lies below a floor, as torch computes it on a GPU, bit for bit.
__device__ SELDOM bool below_floor(float v, float scale, float floor) {
    return (v > 20.0f ? v : log1pf(expf(v))) * scale < floor;
}

// The floor of one channel's Δ, as a limit of what its softplus is made of: one comparison tells
// what torch would freeze, where Δ itself, computed in another way than torch's, can only tell
// what is not close to the floor.
struct Limit {
    float low, high;  // below low, Δ is below its floor; from high on it is not; NaN is no end

    __device__ __forceinline__ bool doubtful() const { return !(low >= high); }
};

// Whether v lies so close above a low that its high, if that is another, may lie above v.
__device__ __forceinline__ bool close_above(float low, float v) {
    return v >= low && !(v >= fmaf(4e-6f, 1.0f + fabsf(low), low));
}

__device__ __forceinline__ float floats_on(float from, int count) {
    u32 bits = __float_as_uint(from);
    return __uint_as_float(from < 0.0f ? bits - count : bits + count);
}

// Half the width of where roundings may decide: twice what those of softplus, scale and `middle`
// itself come to.
__device__ __forceinline__ float doubt_around(float middle) {
    return 7e-7f * (1.0f + fmaxf(middle, 0.0f)) + 2e-7f * (1.0f + fabsf(middle));
}

// All floats close to where softplus reaches the floor are tried out, by LANES lanes together.
template <int LANES>
__device__ __forceinline__ Limit limit_of(float scale, float floor, int lane) {
    constexpr float LARGEST = 3.4e38f;
    constexpr int MOST = 256;  // floats worth trying
    float endless = __uint_as_float(0x7f800000), nowhere = __uint_as_float(0x7fffffff);
    Limit open = {-endless, nowhere};
    if (!(scale > 0.0f)) return open;
    if (!(floor > 0.0f)) return {-LARGEST, -LARGEST};
    if (floor == endless && scale <= 1.0f) return {endless, endless};
    float target = floor / scale;
    if (floor < 1e-37f || target < 1e-37f || target > 1e30f) return open;
    float middle = target > 20.0f ? target : logf(expm1f(target));
    float low = middle - doubt_around(middle), high = middle + doubt_around(middle);
    int count = abs(static_cast<int>(__float_as_uint(high) - __float_as_uint(low)));
    if ((low < 0.0f) != (high < 0.0f) || count > MOST) return {low, high};
    int first_open = count, last_frozen = -1;
#pragma unroll 1
    for (int start = 0; start < count; start += LANES) {
        int i = LANES == 1 ? start : start + lane;
        bool frozen = i < count && below_floor(floats_on(low, i), scale, floor);
        int is_open = frozen ? count : min(i, count), is_frozen = frozen ? i : -1;
        first_open = min(first_open, LANES == 1 ? is_open : __reduce_min_sync(~0u, is_open));
        last_frozen = max(last_frozen, LANES == 1 ? is_frozen : __reduce_max_sync(~0u, is_frozen));
    }
    return {floats_on(low, first_open), floats_on(low, last_frozen + 1)};
}

template <int KIND>
constexpr int BYTES = KIND == 0 ? 4 : 2;

template <bool NARROW>
struct Unsigned {
    using Type = u16;
};
template <>
struct Unsigned<false> {
    using Type = u32;
};
template <int KIND>
using Number = typename Unsigned<KIND != 0>::Type;  // as it lies in memory

template <int KIND>
__device__ __forceinline__ float widen(u32 bits) {
    if (KIND == 0) return __uint_as_float(bits);
    if (KIND == 1) return __uint_as_float(bits << 16);
    return half_to_float(static_cast<u16>(bits));
}

// The first or the second of two numbers of 16 bits that lie side by side.
template <int KIND>
__device__ __forceinline__ float half_of(u32 both, int i) {
    if (KIND == 1 && i) return __uint_as_float(both & 0xffff0000u);
    return widen<KIND>(i ? both >> 16 : both & 0xffffu);
}

template <int KIND>
__device__ __forceinline__ u32 narrow(float low, float high) {
    return KIND == 1 ? pack_bfloat16(low, high) : pack_half(low, high);
}

// Where a row's sequences end: KIND 1 as int, 2 as long long.
template <int KIND>
__device__ __forceinline__ i64 end_at(const void* ends, i64 sequence) {
    if (KIND == 1) return static_cast<const int*>(ends)[sequence];
    return static_cast<const i64*>(ends)[sequence];
}

template <int KIND>
__device__ __forceinline__ float number_at(const void* base, i64 index) {
    if (KIND == 0) return static_cast<const float*>(base)[index];
    return widen<KIND>(static_cast<const u16*>(base)[index]);
}
