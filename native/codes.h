// Weights to codes and back, block by block, and codes to bytes and back. Each has a reference in torch with the same bits.
#pragma once

#include <cstdint>

#include "levels.h"

namespace bitpress {

// `[blocks, n]` weights; one scale a block, and one zero point a block or `offset` for all of them.
struct AffineBlocks {
    const float *scale;
    const float *zero;  // null: `offset`
    float offset;
    float top;
};

void encode_affine(const float *values, std::uint8_t *codes, std::int64_t blocks, std::int64_t n, const AffineBlocks &levels,
                   int threads);
void decode_affine(const std::uint8_t *codes, float *values, std::int64_t blocks, std::int64_t n, const AffineBlocks &levels,
                   int threads);

void encode_levels(const float *values, std::uint8_t *codes, std::int64_t blocks, std::int64_t n, const float *scale,
                   const LevelTable &table, int threads);
// table: 256 levels by code.
void decode_levels(const std::uint8_t *codes, float *values, std::int64_t blocks, std::int64_t n, const float *scale,
                   const float *table, int threads);

// The dense layout: `count` codes of `bits` bits (1 to 8) a row, least significant bit first, rows of whole bytes.
void pack_dense(const std::uint8_t *codes, std::uint8_t *packed, std::int64_t rows, std::int64_t count, int bits, int threads);
void unpack_dense(const std::uint8_t *packed, std::uint8_t *codes, std::int64_t rows, std::int64_t count, int bits, int threads);

}  // namespace bitpress
