#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "share.h"
#include "vector_units.h"

namespace bitpress {

namespace {

EVERY_VECTOR_UNIT
void encode_affine_range(const float *values, std::uint8_t *codes, std::int64_t first, std::int64_t last, std::int64_t n,
                         const AffineBlocks &levels) {
    const float top = levels.top;
    for (std::int64_t b = first; b < last; ++b) {
        const float divisor = levels.scale[b] == 0.0f ? 1.0f : levels.scale[b];
        const float zero = levels.zero ? levels.zero[b] : levels.offset;
        const float *from = values + b * n;
        std::uint8_t *to = codes + b * n;
        for (std::int64_t i = 0; i < n; ++i) {
            float code = std::nearbyint(from[i] / divisor) + zero;
            code = code < 0.0f ? 0.0f : code;
            code = code > top ? top : code;
            to[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
        }
    }
}

EVERY_VECTOR_UNIT
void decode_affine_range(const std::uint8_t *codes, float *values, std::int64_t first, std::int64_t last, std::int64_t n,
                         const AffineBlocks &levels) {
    for (std::int64_t b = first; b < last; ++b) {
        const float scale = levels.scale[b], zero = levels.zero ? levels.zero[b] : levels.offset;
        const std::uint8_t *from = codes + b * n;
        float *to = values + b * n;
        for (std::int64_t i = 0; i < n; ++i) to[i] = (static_cast<float>(from[i]) - zero) * scale;
    }
}

EVERY_VECTOR_UNIT
void decode_levels_range(const std::uint8_t *codes, float *values, std::int64_t first, std::int64_t last, std::int64_t n,
                         const float *scale, const float *table) {
    for (std::int64_t b = first; b < last; ++b) {
        const float factor = scale[b];
        const std::uint8_t *from = codes + b * n;
        float *to = values + b * n;
        for (std::int64_t i = 0; i < n; ++i) to[i] = table[from[i]] * factor;
    }
}

std::int64_t row_bytes(std::int64_t count, int bits) { return (count * bits + 7) / 8; }

// Eight codes fill exactly `bits` bytes: one 64-bit word carries them.
template <int bits>
void pack_rows(const std::uint8_t *codes, std::uint8_t *packed, std::int64_t first, std::int64_t last, std::int64_t count) {
    const std::int64_t bytes = row_bytes(count, bits), whole = count / 8;
    for (std::int64_t row = first; row < last; ++row) {
        const std::uint8_t *from = codes + row * count;
        std::uint8_t *to = packed + row * bytes;
        for (std::int64_t w = 0; w < whole; ++w) {
            std::uint64_t word = 0;
            for (int i = 0; i < 8; ++i) word |= static_cast<std::uint64_t>(from[w * 8 + i]) << (bits * i);
            std::memcpy(to + w * bits, &word, bits);
        }
        if (count % 8) {
            std::uint64_t word = 0;
            for (std::int64_t i = whole * 8; i < count; ++i) word |= static_cast<std::uint64_t>(from[i]) << (bits * (i - whole * 8));
            std::memcpy(to + whole * bits, &word, static_cast<std::size_t>(bytes - whole * bits));
        }
    }
}

template <int bits>
void unpack_rows(const std::uint8_t *packed, std::uint8_t *codes, std::int64_t first, std::int64_t last, std::int64_t count) {
    constexpr std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
    const std::int64_t bytes = row_bytes(count, bits), whole = count / 8;
    for (std::int64_t row = first; row < last; ++row) {
        const std::uint8_t *from = packed + row * bytes;
        std::uint8_t *to = codes + row * count;
        for (std::int64_t w = 0; w < whole; ++w) {
            std::uint64_t word = 0;
            std::memcpy(&word, from + w * bits, bits);
            for (int i = 0; i < 8; ++i) to[w * 8 + i] = static_cast<std::uint8_t>((word >> (bits * i)) & mask);
        }
        if (count % 8) {
            std::uint64_t word = 0;
            std::memcpy(&word, from + whole * bits, static_cast<std::size_t>(bytes - whole * bits));
            for (std::int64_t i = whole * 8; i < count; ++i)
                to[i] = static_cast<std::uint8_t>((word >> (bits * (i - whole * 8))) & mask);
        }
    }
}

template <typename Work>
void for_width(int bits, const Work &work) {
    switch (bits) {
        case 1: return work.template operator()<1>();
        case 2: return work.template operator()<2>();
        case 3: return work.template operator()<3>();
        case 4: return work.template operator()<4>();
        case 5: return work.template operator()<5>();
        case 6: return work.template operator()<6>();
        case 7: return work.template operator()<7>();
        default: return work.template operator()<8>();
    }
}

}  // namespace

void encode_affine(const float *values, std::uint8_t *codes, std::int64_t blocks, std::int64_t n, const AffineBlocks &levels,
                   int threads) {
    share(blocks, n, threads, [&](std::int64_t first, std::int64_t last) { encode_affine_range(values, codes, first, last, n, levels); });
}

void decode_affine(const std::uint8_t *codes, float *values, std::int64_t blocks, std::int64_t n, const AffineBlocks &levels,
                   int threads) {
    share(blocks, n, threads, [&](std::int64_t first, std::int64_t last) { decode_affine_range(codes, values, first, last, n, levels); });
}

void encode_levels(const float *values, std::uint8_t *codes, std::int64_t blocks, std::int64_t n, const float *scale,
                   const LevelTable &table, int threads) {
    const Ranker ranks(table);
    share(blocks, n, threads, [&](std::int64_t first, std::int64_t last) {
        float scaled[kRanked];
        std::int32_t rank[kRanked];
        for (std::int64_t b = first; b < last; ++b) {
            for (std::int64_t start = 0; start < n; start += kRanked) {
                const std::int64_t here = std::min(kRanked, n - start);
                scale_down(values + b * n + start, scaled, here, scale[b]);
                ranks(scaled, rank, here);
                codes_of(table, scaled, rank, codes + b * n + start, here);
            }
        }
    });
}

void decode_levels(const std::uint8_t *codes, float *values, std::int64_t blocks, std::int64_t n, const float *scale,
                   const float *table, int threads) {
    share(blocks, n, threads,
          [&](std::int64_t first, std::int64_t last) { decode_levels_range(codes, values, first, last, n, scale, table); });
}

void pack_dense(const std::uint8_t *codes, std::uint8_t *packed, std::int64_t rows, std::int64_t count, int bits, int threads) {
    for_width(bits, [&]<int width>() {
        share(rows, count, threads, [&](std::int64_t first, std::int64_t last) { pack_rows<width>(codes, packed, first, last, count); });
    });
}

void unpack_dense(const std::uint8_t *packed, std::uint8_t *codes, std::int64_t rows, std::int64_t count, int bits, int threads) {
    for_width(bits, [&]<int width>() {
        share(rows, count, threads, [&](std::int64_t first, std::int64_t last) { unpack_rows<width>(packed, codes, first, last, count); });
    });
}

}  // namespace bitpress
