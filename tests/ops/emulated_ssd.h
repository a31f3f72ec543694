// What outputs.cu writes in PTX, for emulated_cuda.h: shared memory by address, products of tiles.

static unsigned char* shared_at(unsigned address) {
    return reinterpret_cast<unsigned char*>(emulated_shared) + address;
}
#define shared_memory shared_at(0)
static unsigned address(unsigned place) { return place; }
static void copy16(unsigned to, const void* from, int bytes) {
    std::memset(shared_at(to), 0, 16), std::memcpy(shared_at(to), from, bytes);
}
static void copies_commit() {}
static void copies_wait() {}
static void publish() {}
static void products_begin() {}
static void products_commit() {}
template <int LEFT>
static void products_wait() {}
template <int N>
static void pin(float (&)[N]) {}

template <typename T>
static T read_as(unsigned from) {
    T r;
    std::memcpy(&r, shared_at(from), sizeof r);
    return r;
}
static float widened(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// The rows of four matrices of 8 x 8 numbers, as the lanes of a warp have given them.
static const Warp& with_rows(unsigned row) {
    Warp& warp = warps[current / 32];
    warp.values[current % 32] = row;
    __syncwarp();
    return warp;
}
static void read_matrices(unsigned* r, unsigned row) {
    const Warp& warp = with_rows(row);
    for (int m = 0; m < 4; m++)
        r[m] = read_as<unsigned>(warp.values[8 * m + current % 32 / 4] + current % 4 * 4);
    __syncwarp();
}
static void read_turned(unsigned* r, unsigned row) {
    const Warp& warp = with_rows(row);
    for (int m = 0; m < 4; m++) {
        unsigned pair[2];
        for (int i = 0; i < 2; i++)
            pair[i] = read_as<unsigned short>(warp.values[8 * m + current % 4 * 2 + i] +
                                              current % 32 / 4 * 2);
        r[m] = pair[0] | pair[1] << 16;
    }
    __syncwarp();
}
static void write_matrices(unsigned row, unsigned a, unsigned b, unsigned c, unsigned d) {
    const Warp& warp = with_rows(row);
    unsigned value[] = {a, b, c, d};
    for (int m = 0; m < 4; m++)
        std::memcpy(shared_at(warp.values[8 * m + current % 32 / 4] + current % 4 * 4), &value[m],
                    4);
    __syncwarp();
}

// A number of an operand: its place along the side that lies along memory, and along the other.
static float operand(unsigned long long described, int along, int across) {
    unsigned start = (described & 0x3fff) << 4, beside = (described >> 16 & 0x3fff) << 4;
    unsigned eight = (described >> 32 & 0x3fff) << 4;
    unsigned at =
        start + along / 64 * beside + across / 8 * eight + across % 8 * 128 + along % 64 * 2;
    return widened(read_as<unsigned short>(at ^ (at >> 7 & 7) << 4));
}
static void multiply_tiles(float (&d)[32], unsigned long long a, unsigned long long b, int add) {
    int row = current % 128 / 32 * 16 + current % 32 / 4;
    for (int i = 0; i < 32; i++) {
        int column = i / 4 * 8 + current % 4 * 2 + i % 2;
        double sum = add ? d[i] : 0.0;
        for (int k = 0; k < 16; k++)
            sum += operand(a, k, row + i / 2 % 2 * 8) * operand(b, k, column);
        d[i] = sum;
    }
}
template <int N>
static void multiply_turned(float (&d)[N], const unsigned* a, unsigned long long b, int add) {
    float left[2][16];
    for (int m = 0; m < 4; m++)
        for (int lane = 0; lane < 4; lane++) {
            unsigned pair = from_lane(a[m], current % 32 / 4 * 4 + lane);
            left[m % 2][m / 2 * 8 + lane * 2] = widened(pair);
            left[m % 2][m / 2 * 8 + lane * 2 + 1] = widened(pair >> 16);
        }
    for (int i = 0; i < N; i++) {
        double sum = add ? d[i] : 0.0;
        for (int k = 0; k < 16; k++)
            sum += left[i / 2 % 2][k] * operand(b, i / 4 * 8 + current % 4 * 2 + i % 2, k);
        d[i] = sum;
    }
}
