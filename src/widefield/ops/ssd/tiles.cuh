// Tiles of 64 tokens in shared memory, and products of them on Hopper's tensor cores. For every
// file that includes this:
//   STATES 64 or 128
//
// Tiles are bfloat16, in rows of 64 numbers whose pieces of 16 bytes are exchanged as the tensor
// cores want it (swizzle of 128 bytes); B and C are as many tiles as states need, side by side.
// Results of products are in registers: a lane's rows are 16 warp + lane / 4 and 8 further, its
// columns 8 q + lane % 4 * 2 and one further, for each q in the order of the registers.

constexpr int CHUNK = 64;
constexpr int ROW = 128;           // bytes of a row of 64 numbers
constexpr int TILE = CHUNK * ROW;  // bytes of 64 such rows
constexpr int HALVES = STATES / 64;
constexpr int PIECES = 8 * HALVES;  // of 16 bytes, of a token's B or C

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
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(row)),
        "r"(a), "r"(b), "r"(c), "r"(d));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;"); }
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

#define D8(d, i)                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(d) D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24)
#define N32                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
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

// Of a piece of 16 bytes in a tile of rows of 128.
__device__ __forceinline__ u32 spot(int row, int piece) {
    return row * ROW + ((piece ^ (row & 7)) << 4);
}

// How the tensor cores find a tile: 8 rows are 1,024 bytes, tiles side by side are TILE bytes
// apart.
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

// Of a tile of tokens and so many pieces each, in turns of STEP threads; zeros behind the last
// token. The thread's piece moves on to the next chunk.
template <bool WHOLE, int WIDE, int STEP, i64 TOKEN>
__device__ __forceinline__ void fetch_tile(u32 to, const u8*& from, int self, int left) {
    constexpr int ROWS = STEP / WIDE;  // a multiple of 8: pieces stay where they are in a row
    static_assert(STEP % WIDE == 0 && ROWS % 8 == 0, "turns do not fit");
    int t = self / WIDE, piece = self % WIDE;
    to += TILE * (piece / 8) + spot(t, piece % 8);
#pragma unroll
    for (int turn = 0; turn < (CHUNK + ROWS - 1) / ROWS; turn++, t += ROWS) {
        if (CHUNK % ROWS != 0 && t >= CHUNK) break;
        copy16(to + turn * ROWS * ROW, from + turn * ROWS * TOKEN, WHOLE || t < left ? 16 : 0);
    }
    from += CHUNK * TOKEN;
}
// The channels of a warp (rows) and a chunk's tokens, of the 64 channels in a tile; in the order of
// what products read from registers.
__device__ __forceinline__ void read_channels(u32 (&r)[16], u32 tile, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        // Matrices: tokens 16 k and up, channels 16 warp and up; then 8 channels further; then
        // both 8 tokens further.
        int t = 16 * k + lane % 8 + lane / 16 * 8;
        read_turned(r + 4 * k, tile + spot(t, 2 * warp + lane / 8 % 2));
    }
}
// d (+)= a b of a matrix in registers and a tile, over the chunk's tokens.
template <int N>
__device__ __forceinline__ void multiply_by_tokens(float (&d)[N], const u32 (&a)[16], u64 b,
                                                   bool add) {
#pragma unroll
    for (int k = 0; k < 4; k++)
        multiply_turned(d, a + 4 * k, b + (k * 16 * ROW >> 4), add || k > 0);
    products_commit();
}
