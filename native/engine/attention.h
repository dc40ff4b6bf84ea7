// What attention shares with the kinds of caches. Included by one source file per code path, like lanes.h.
//
// Queries and weights of positions that meet bytes are split into two signed digits each (15 bits), so that one product with bytes
// loses no more than sixteen-bit activations do.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "lanes.h"

namespace bitpress::BITPRESS_PATH {

constexpr int MOST_QUERIES = 8;
constexpr int WIDTH = CHUNK_POSITIONS + 64;  // a row of scores: a whole piece, in steps of 64

// The digits of x * inverse, 128 * high + low after multiplying by 128; returns the sums of both.
struct DigitSums { int32_t high, low; };
INLINE DigitSums split_digits(const float *x, int n, float inverse, int8_t *high, int8_t *low) {
    const Floats factor = set_floats(inverse), base = set_floats(128.0f);
    Ints a = zero_ints(), b = zero_ints();
    for (int i = 0; i < n; i += STRIP) {
        const Floats v = load_floats(x + i) * factor;
        const Ints h = to_ints(v), l = to_ints((v - to_floats(h)) * base);
        store_i8(high + i, h), store_i8(low + i, l);
        a = a + h, b = b + l;
    }
    return {sum(a), sum(b)};
}

// 128 * high + low of a row's integers, without what the 128 added to every byte brought in.
INLINE Floats joined(const int32_t *high, const int32_t *low, DigitSums sums) {
    const Floats h = to_floats(load_ints(high) - set_ints(128 * sums.high)), l = to_floats(load_ints(low) - set_ints(128 * sums.low));
    return fma(h, set_floats(128.0f), l);
}

INLINE float digit_inverse(float most) { return most > 1e-30f ? 127.0f / most : 0.0f; }

// A cache of bytes, with the path's own integer products:
//     Dots::score(keys, head, blocks, digits, count, to)        to[2 count][WIDTH] = digits[2 count][head] . (keys + 128)
//     Dots::weigh(values, head, positions, digits, count, to)   to[2 count][head] = digits[2 count][WIDTH] . (values + 128)
template <class Dots> void score_bytes(const CacheView &c, int start, int blocks, const float *queries, int count, float *to) {
    alignas(64) int32_t integers[2 * MOST_QUERIES * WIDTH];
    alignas(64) int8_t digits[2 * MOST_QUERIES * MOST_HEAD];
    DigitSums parts[MOST_QUERIES];
    float units[MOST_QUERIES];
    const int head = c.head;
    for (int q = 0; q < count; ++q) {
        const float *x = queries + q * head;
        Floats top = zero_floats();
        for (int d = 0; d < head; d += STRIP) top = max(top, abs(load_floats(x + d)));
        const float most = largest(top);
        units[q] = most / (127.0f * 128.0f);
        parts[q] = split_digits(x, head, digit_inverse(most), digits + 2 * q * head, digits + (2 * q + 1) * head);
    }
    Dots::score(static_cast<const uint8_t *>(c.keys) + size_t(start) * head, head, blocks, digits, count, integers);
    for (int q = 0; q < count; ++q) {
        const int32_t *high = integers + 2 * q * WIDTH, *low = high + WIDTH;
        const Floats unit = set_floats(units[q]);
        for (int i = 0; i < blocks * 16; i += STRIP) {
            store(to + q * WIDTH + i, joined(high + i, low + i, parts[q]) * unit * load_floats(c.key_scales + start + i));
        }
    }
}

template <class Dots> void weigh_bytes(const CacheView &c, int start, int positions, const float *weights, int count, float *out) {
    alignas(64) int32_t integers[2 * MOST_QUERIES * MOST_HEAD];
    alignas(64) int8_t digits[2 * MOST_QUERIES * WIDTH];
    alignas(64) float line[WIDTH];
    DigitSums parts[MOST_QUERIES];
    float units[MOST_QUERIES];
    const int head = c.head, filled = (positions + 15) / 16 * 16, padded = (positions + 63) / 64 * 64;
    for (int q = 0; q < count; ++q) {
        Floats most = zero_floats();
        for (int i = 0; i < filled; i += STRIP) {
            // Behind the last position a scale may be anything; its weight is 0 and must stay so.
            const Floats w = load_floats(weights + q * WIDTH + i) * max(load_floats(c.value_scales + start + i), zero_floats());
            most = max(most, w);
            store(line + i, w);
        }
        for (int i = filled; i < padded; ++i) line[i] = 0;
        const float heaviest = largest(most);
        units[q] = heaviest / (127.0f * 128.0f);
        parts[q] = split_digits(line, padded, digit_inverse(heaviest), digits + 2 * q * WIDTH, digits + (2 * q + 1) * WIDTH);
    }
    Dots::weigh(static_cast<const uint8_t *>(c.values) + size_t(start) * head, head, padded, digits, count, integers);
    for (int q = 0; q < count; ++q) {
        const int32_t *high = integers + 2 * q * head, *low = high + head;
        for (int d = 0; d < head; d += STRIP) store(out + q * head + d, joined(high + d, low + d, parts[q]) * set_floats(units[q]));
    }
}

}  // namespace bitpress::BITPRESS_PATH
