// The products on tiles with the tile instructions written out: the tests run them on processors that have none. Never chosen by itself.
#include <algorithm>
#include <cstring>

#include "halves.h"
#include "kernels.h"

namespace bitpress {

namespace {

struct Tile {
    uint8_t bytes[16][64];
};
thread_local Tile tiles_of_thread[8];

inline void load(int to, const void *from, size_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tiles_of_thread[to].bytes[r], static_cast<const uint8_t *>(from) + r * stride, 64);
}

inline void store(int from, void *to, size_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<uint8_t *>(to) + r * stride, tiles_of_thread[from].bytes[r], 64);
}

// TDPBF16PS: for every pair of columns, the odd products and the even ones; subnormal numbers are not told from others here.
inline void multiply(int sums, int left, int right) {
    float c[16][16];
    uint16_t a[16][32], b[16][32];
    std::memcpy(c, tiles_of_thread[sums].bytes, sizeof c);
    std::memcpy(a, tiles_of_thread[left].bytes, sizeof a);
    std::memcpy(b, tiles_of_thread[right].bytes, sizeof b);
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 16; ++n) {
                c[m][n] += from_bf16(a[m][2 * k]) * from_bf16(b[k][2 * n]) + from_bf16(a[m][2 * k + 1]) * from_bf16(b[k][2 * n + 1]);
            }
        }
    }
    std::memcpy(tiles_of_thread[sums].bytes, c, sizeof c);
}

// TDPBSUD: signed bytes times unsigned ones, four at a time.
inline void multiply_bytes(int sums, int left, int right) {
    int32_t c[16][16];
    std::memcpy(c, tiles_of_thread[sums].bytes, sizeof c);
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 64; ++k) {
            for (int n = 0; n < 16; ++n) c[m][n] += int8_t(tiles_of_thread[left].bytes[m][k]) * int(tiles_of_thread[right].bytes[k / 4][4 * n + k % 4]);
        }
    }
    std::memcpy(tiles_of_thread[sums].bytes, c, sizeof c);
}

#define TILES_BEGIN() static_cast<void>(0)
#define TILES_END() static_cast<void>(0)
#define TILE_LOAD(to, from, stride) load(to, from, stride)
#define TILE_STORE(from, to, stride) store(from, to, stride)
#define TILE_MULTIPLY(sums, left, right) multiply(sums, left, right)
#define TILE_MULTIPLY_BYTES(sums, left, right) multiply_bytes(sums, left, right)
#define TILE_ZERO(to) std::memset(tiles_of_thread[to].bytes, 0, sizeof tiles_of_thread[to].bytes)

void put_sums(const float *out, int from, int to, const Put &put) { portable_kernels().put_sums(out, from, to, put); }
void put_integers(const Coded &m, int strip, int g, const IntegerRows &x, int from, int to, const int32_t *sums, float *out, int stride) {
    portable_kernels().put_integers(m, strip, g, x, from, to, sums, out, stride);
}

#include "kernels_tiles.inc"

}  // namespace

const Kernels &emulated_kernels() {
    static const Kernels table = [] {
        Kernels t = portable_kernels();
        t.name = "emulated";
        t.half_product = half_product;
        t.integer_bytes = 1;
        t.integers_many = integers_many;
        return t;
    }();
    return table;
}

}  // namespace bitpress
