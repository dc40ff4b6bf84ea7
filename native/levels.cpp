#include "levels.h"

#include <algorithm>
#include <cmath>

#include "vector_units.h"

namespace bitpress {

namespace {

// Few levels: compare with every boundary, no memory access but the boundaries.
EVERY_VECTOR_UNIT
void rank_by_counting(const float *scaled, std::int32_t *rank, std::int64_t n, const float *boundaries, std::int64_t count) {
    for (std::int64_t i = 0; i < n; ++i) rank[i] = 0;
    for (std::int64_t k = 0; k < count; ++k) {
        const float boundary = boundaries[k];
        for (std::int64_t i = 0; i < n; ++i) rank[i] += scaled[i] > boundary ? 1 : 0;
    }
}

// Many levels: halve eight times a table of 255 boundaries, padded with infinity.
EVERY_VECTOR_UNIT
void rank_by_halving(const float *scaled, std::int32_t *rank, std::int64_t n, const float *boundaries) {
    for (std::int64_t i = 0; i < n; ++i) rank[i] = 0;
    for (std::int32_t half = 128; half > 0; half /= 2) {
        const float *middle = boundaries + half - 1;
        for (std::int64_t i = 0; i < n; ++i) rank[i] += scaled[i] > middle[rank[i]] ? half : 0;
    }
}

}  // namespace

Ranker::Ranker(const LevelTable &table) : count_(table.num_boundaries) {
    std::fill(boundaries_, boundaries_ + 256, INFINITY);
    std::copy(table.boundaries, table.boundaries + count_, boundaries_);
}

void Ranker::operator()(const float *scaled, std::int32_t *rank, std::int64_t n) const {
    if (count_ <= 31) {
        rank_by_counting(scaled, rank, n, boundaries_, count_);
    } else {
        rank_by_halving(scaled, rank, n, boundaries_);
    }
}

void codes_of(const LevelTable &table, const float *scaled, const std::int32_t *rank, std::uint8_t *codes, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) codes[i] = table.code_of[rank[i]];
    if (table.negative_zero_code < 0) return;
    const auto zero = static_cast<std::uint8_t>(table.zero_code), negative = static_cast<std::uint8_t>(table.negative_zero_code);
    for (std::int64_t i = 0; i < n; ++i) codes[i] = codes[i] == zero && std::signbit(scaled[i]) ? negative : codes[i];
}

EVERY_VECTOR_UNIT
void scale_down(const float *from, float *to, std::int64_t n, float divisor) {
    const float by = divisor == 0.0f ? 1.0f : divisor;
    for (std::int64_t i = 0; i < n; ++i) to[i] = from[i] / by;
}

}  // namespace bitpress
