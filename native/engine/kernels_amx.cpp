// The code path of processors with AMX: tiles for products of many rows, everything else as with AVX-512.
#define BITPRESS_PATH amx
#include <algorithm>
#include <cstring>

#include "../cpu.h"
#include "attention.h"
#include "kernels.h"
#include "lanes.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace bitpress {

namespace {

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes. GCC 12 believes that the instruction reads 8 bytes of the configuration and drops the stores
// of the others; the barrier keeps them.
inline void configure_tiles() {
    TileConfig config;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

using namespace amx;

#define TILES_BEGIN() configure_tiles()
#define TILES_END() _tile_release()
#define TILE_LOAD(to, from, stride) _tile_loadd(to, from, stride)
#define TILE_STORE(from, to, stride) _tile_stored(from, to, stride)
#define TILE_MULTIPLY(sums, left, right) _tile_dpbf16ps(sums, left, right)
#define TILE_MULTIPLY_BYTES(sums, left, right) _tile_dpbsud(sums, left, right)
#define TILE_ZERO(to) _tile_zero(to)

inline void put_sums(const float *out, int from, int to, const Put &put) { avx512_kernels()->put_sums(out, from, to, put); }
inline void put_integers(const Coded &m, int strip, int g, const IntegerRows &x, int from, int to, const int32_t *sums, float *out, int stride) {
    avx512_kernels()->put_integers(m, strip, g, x, from, to, sums, out, stride);
}

#include "kernels_tiles.inc"

// Two rows of 16 floats as 16 pairs of bf16, the first row in the low halves.
inline __m512i pairs(Floats a, Floats b) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b.v)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// A tile of keys is 32 elements of the head (16 rows of pairs) x 16 positions, one of values 32 positions x 16 elements.
void tile_halves(const CacheView &c, int from, int to, int length, uint16_t *keys, uint16_t *values) {
    const int head = c.head;
    for (int p = from * 32; p < to * 32; p += 16) {
        const uint16_t *k = static_cast<const uint16_t *>(c.keys) + size_t(p) * head;
        uint16_t *out = keys + size_t(p) * head;
        for (int d = 0; d < head; d += 2, out += 32) _mm512_storeu_si512(out, pairs(load_f16(k + d * 16), load_f16(k + (d + 1) * 16)));
    }
    for (int block = from; block < to; ++block) {
        for (int d = 0; d < head; d += 16) {
            uint16_t *out = values + size_t(block) * 32 * head + size_t(d) * 32;
            for (int p = block * 32; p < block * 32 + 32; p += 2, out += 32) {
                const uint16_t *v = static_cast<const uint16_t *>(c.values) + size_t(p) * head + d;
                const Floats a = p < length ? load_f16(v) : zero_floats(), b = p + 1 < length ? load_f16(v + head) : zero_floats();
                _mm512_storeu_si512(out, pairs(a, b));
            }
        }
    }
}

void tile_bytes(const CacheView &c, int from, int to, int length, uint16_t *keys, uint16_t *values) {
    const int head = c.head;
    const Ints middle = set_ints(128);
    for (int p = from * 32; p < to * 32; p += 16) {
        const uint8_t *k = static_cast<const uint8_t *>(c.keys) + size_t(p) * head;
        const Floats scale = load_floats(c.key_scales + p);
        uint16_t *out = keys + size_t(p) * head;
        for (int d = 0; d < head; d += 4, out += 64) {
            const Bytes four = load_bytes(k + d * 16);
            auto element = [&](Ints code) FLAT { return to_floats(code - middle) * scale; };
            _mm512_storeu_si512(out, pairs(element(column<0>(four)), element(column<1>(four))));
            _mm512_storeu_si512(out + 32, pairs(element(column<2>(four)), element(column<3>(four))));
        }
    }
    for (int block = from; block < to; ++block) {
        for (int d = 0; d < head; d += 16) {
            uint16_t *out = values + size_t(block) * 32 * head + size_t(d) * 32;
            for (int p = block * 32; p < block * 32 + 32; p += 4, out += 64) {
                const Bytes four = load_bytes(static_cast<const uint8_t *>(c.values) + size_t(p) * head + size_t(d) * 4);
                auto element = [&](Ints code, int at) FLAT {
                    return at < length ? to_floats(code - middle) * set_floats(c.value_scales[at]) : zero_floats();
                };
                _mm512_storeu_si512(out, pairs(element(column<0>(four), p), element(column<1>(four), p + 1)));
                _mm512_storeu_si512(out + 32, pairs(element(column<2>(four), p + 2), element(column<3>(four), p + 3)));
            }
        }
    }
}

// Both caches of bytes are laid out as the right operand of a tile product already; the digits of all queries are the left one.
struct TileDots {
    static void configure(int rows) {
        TileConfig config;
        for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = uint8_t(t < 5 ? rows : 16);
        asm volatile("" : : "r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    static void score(const uint8_t *keys, int head, int blocks, const int8_t *digits, int count, int32_t *to) {
        configure(2 * count);
        for (int b = 0; b < blocks; b += 4) {  // up to three blocks behind the last one: they are in the cache's memory
            const uint8_t *k = keys + size_t(b) * head * 16;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int d = 0; d < head; d += 64) {
                _tile_loadd(4, digits + d, head);
                _tile_loadd(5, k + d * 16, 64);
                _tile_dpbsud(0, 4, 5);
                _tile_loadd(6, k + (head + d) * 16, 64);
                _tile_dpbsud(1, 4, 6);
                _tile_loadd(7, k + (2 * head + d) * 16, 64);
                _tile_dpbsud(2, 4, 7);
                _tile_loadd(5, k + (3 * head + d) * 16, 64);
                _tile_dpbsud(3, 4, 5);
            }
            int32_t *out = to + b * 16;
            _tile_stored(0, out, WIDTH * 4);
            _tile_stored(1, out + 16, WIDTH * 4);
            _tile_stored(2, out + 32, WIDTH * 4);
            _tile_stored(3, out + 48, WIDTH * 4);
        }
        _tile_release();
    }
    static void weigh(const uint8_t *values, int head, int positions, const int8_t *digits, int count, int32_t *to) {
        configure(2 * count);
        for (int d = 0; d < head; d += 64) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int p = 0; p < positions; p += 64) {
                const uint8_t *v = values + size_t(p) * head + size_t(d) * 4;
                _tile_loadd(4, digits + p, WIDTH);
                _tile_loadd(5, v, head * 4);
                _tile_dpbsud(0, 4, 5);
                _tile_loadd(6, v + 64, head * 4);
                _tile_dpbsud(1, 4, 6);
                _tile_loadd(7, v + 128, head * 4);
                _tile_dpbsud(2, 4, 7);
                _tile_loadd(5, v + 192, head * 4);
                _tile_dpbsud(3, 4, 5);
            }
            _tile_stored(0, to + d, head * 4);
            _tile_stored(1, to + d + 16, head * 4);
            _tile_stored(2, to + d + 32, head * 4);
            _tile_stored(3, to + d + 48, head * 4);
        }
        _tile_release();
    }
};

void score_on_tiles(const CacheView &c, int start, int blocks, const float *queries, int count, float *to) {
    if (c.head % 64 != 0) return choose_cache(*avx512_kernels(), "int8").score(c, start, blocks, queries, count, to);
    score_bytes<TileDots>(c, start, blocks, queries, count, to);
}

void weigh_on_tiles(const CacheView &c, int start, int positions, const float *weights, int count, float *out) {
    if (c.head % 64 != 0) return choose_cache(*avx512_kernels(), "int8").weigh(c, start, positions, weights, count, out);
    weigh_bytes<TileDots>(c, start, positions, weights, count, out);
}

// The kinds of caches, with what tiles do of them.
const CacheKind *caches_on_tiles() {
    static CacheKind kinds[MOST_CACHES];
    const Kernels &plain = *avx512_kernels();
    for (int i = 0; i < plain.cache_kinds; ++i) {
        CacheKind &kind = kinds[i] = plain.caches[i];
        if (std::strcmp(kind.name, "fp16") == 0) kind.tile = tile_halves;
        if (std::strcmp(kind.name, "int8") == 0) kind.tile = tile_bytes, kind.score = score_on_tiles, kind.weigh = weigh_on_tiles;
    }
    return kinds;
}

inline void store_bf16(uint16_t *to, Floats a, Floats b) {  // 32 numbers in order
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}

// Online softmax over pieces of 256 positions: two tiles of 16 query rows against two tiles of 16 positions at a time.
void attend_tiles(int head, const uint16_t *keys, const uint16_t *values, int position, int rows, int window, const float *queries,
                  int stride, float *out, float *scratch) {
    constexpr int PIECE = CHUNK_POSITIONS;
    float *scores = scratch;                                                     // [32][PIECE]
    uint16_t *weights = reinterpret_cast<uint16_t *>(scores + 32 * PIECE);       // [2][PIECE / 32][16][32]
    uint16_t *q = weights + 32 * PIECE;                                          // [2][head / 32][16][32]
    float *sums = reinterpret_cast<float *>(q + 32 * head);                      // [32][head]
    float tops[32], totals[32];
    for (int r = 0; r < 32; ++r) {
        tops[r] = -1e30f, totals[r] = 0;
        for (int d = 0; d < head; d += 32) {
            uint16_t *to = q + size_t(r / 16) * 16 * head + size_t(d) * 16 + r % 16 * 32;
            if (r < rows) {
                const float *from = queries + size_t(r) * stride + d;
                store_bf16(to, load_floats(from), load_floats(from + 16));
            } else {
                std::memset(to, 0, 64);
            }
        }
    }
    std::memset(sums, 0, size_t(32) * head * sizeof(float));
    const int last = position + rows - 1;  // the newest position that any row sees
    const int first = window > 0 ? std::max(0, position + 1 - window) / 32 * 32 : 0;
    configure_tiles();
    for (int begin = first; begin <= last; begin += PIECE) {
        const int end = std::min(begin + PIECE, last / 32 * 32 + 32), count = end - begin;
        for (int p = begin; p < end; p += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int d = 0; d < head; d += 32) {
                _tile_loadd(4, q + d * 16, 64);
                _tile_loadd(5, q + 16 * head + d * 16, 64);
                _tile_loadd(6, keys + size_t(p) * head + d * 16, 64);
                _tile_loadd(7, keys + size_t(p + 16) * head + d * 16, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float *to = scores + (p - begin);
            _tile_stored(0, to, PIECE * 4);
            _tile_stored(1, to + 16, PIECE * 4);
            _tile_stored(2, to + 16 * PIECE, PIECE * 4);
            _tile_stored(3, to + 16 * PIECE + 16, PIECE * 4);
        }
        for (int r = 0; r < rows; ++r) {
            float *s = scores + r * PIECE;
            const int newest = position + r, oldest = window > 0 ? newest + 1 - window : 0;
            for (int i = std::max(0, newest + 1 - begin); i < count; ++i) s[i] = -1e30f;
            for (int i = 0; i < std::min(count, oldest - begin); ++i) s[i] = -1e30f;
            Floats most = load_floats(s);
            for (int i = 16; i < count; i += 16) most = max(most, load_floats(s + i));
            const float top = std::max(tops[r], largest(most));
            const float factor = tops[r] == top ? 1.0f : std::exp(tops[r] - top);
            const Floats shift = set_floats(top);
            Floats total = zero_floats();
            uint16_t *w = weights + size_t(r / 16) * 16 * PIECE + r % 16 * 32;
            for (int i = 0; i < count; i += 32) {
                const Floats a = exponential(load_floats(s + i) - shift), b = exponential(load_floats(s + i + 16) - shift);
                total = total + a + b;
                store_bf16(w + size_t(i) * 16, a, b);
            }
            totals[r] = totals[r] * factor + sum(total);
            tops[r] = top;
            if (factor != 1.0f) {
                for (int d = 0; d < head; d += 16) {
                    store(sums + size_t(r) * head + d, load_floats(sums + size_t(r) * head + d) * set_floats(factor));
                }
            }
        }
        for (int d = 0; d < head; d += 32) {
            float *to = sums + d;
            _tile_loadd(0, to, head * 4);
            _tile_loadd(1, to + 16, head * 4);
            _tile_loadd(2, to + 16 * head, head * 4);
            _tile_loadd(3, to + 16 * head + 16, head * 4);
            for (int p = begin; p < end; p += 32) {
                const uint16_t *w = weights + size_t(p - begin) * 16, *v = values + size_t(p) * head + size_t(d) * 32;
                _tile_loadd(4, w, 64);
                _tile_loadd(5, w + 16 * PIECE, 64);
                _tile_loadd(6, v, 64);
                _tile_loadd(7, v + 16 * 32, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, head * 4);
            _tile_stored(1, to + 16, head * 4);
            _tile_stored(2, to + 16 * head, head * 4);
            _tile_stored(3, to + 16 * head + 16, head * 4);
        }
    }
    _tile_release();
    for (int r = 0; r < rows; ++r) {
        const Floats inverse = set_floats(1.0f / totals[r]);
        for (int d = 0; d < head; d += 16) {
            store(out + size_t(r) * stride + d, load_floats(sums + size_t(r) * head + d) * inverse);
        }
    }
}

void peak(int repeats) {
    alignas(64) int8_t tile[1024] = {};
    configure_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, tile, 64);
    _tile_loadd(5, tile, 64);
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile, 64);
    for (int r = 0; r < repeats; ++r) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
}

#endif

}  // namespace

const Kernels *amx_kernels() {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    if (avx512_kernels() == nullptr || !has_amx_int8()) return nullptr;
    static const Kernels table = [] {
        Kernels t = *avx512_kernels();
        t.name = "amx";
        t.half_product = half_product;
        t.integers_many = integers_many;
        t.caches = caches_on_tiles();
        t.attend_tiles = attend_tiles;
        t.peak = peak;
        t.peak_operations = 4.0 * 2 * 16 * 16 * 32;
        return t;
    }();
    return &table;
#else
    return nullptr;
#endif
}

}  // namespace bitpress
