#include "feedback.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu.h"
#include "half.h"
#include "vector_units.h"

namespace bitpress {

namespace {

// Rows that stay in the first-level cache together: 128 columns of them are 16 kB.
constexpr std::int64_t kRows = 32;

struct Strip {
    float *w;  // [cols][kRows]
    float *errors;
    std::uint8_t *codes;
    float *scale;
    float *zero;
    float *least;  // null where nothing is kept apart
    float *kept;
};

// One column of a strip: the codes nearest to `w`, and what each leaves of it.
EVERY_VECTOR_UNIT
void round_evenly(const float *w, const float *scale, const float *zero, float top, std::uint8_t *codes, float *error) {
    for (std::int64_t r = 0; r < kRows; ++r) {
        // A scale of 0 marks a block of zeros; dividing by 1 there keeps the code finite, and decoding gives 0 anyway.
        const float divisor = scale[r] == 0.0f ? 1.0f : scale[r];
        float code = std::nearbyint(w[r] / divisor) + zero[r];
        code = code < 0.0f ? 0.0f : code;
        code = code > top ? top : code;
        codes[r] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
        error[r] = w[r] - (code - zero[r]) * scale[r];
    }
}

EVERY_VECTOR_UNIT
void scale_rows_down(const float *w, const float *scale, float *scaled) {
    for (std::int64_t r = 0; r < kRows; ++r) scaled[r] = w[r] / (scale[r] == 0.0f ? 1.0f : scale[r]);
}

EVERY_VECTOR_UNIT
void left_of_levels(const float *w, const float *scale, const float *levels, const std::int32_t *rank, float *error) {
    for (std::int64_t r = 0; r < kRows; ++r) error[r] = w[r] - levels[rank[r]] * scale[r];
}

void round_to_table(const float *w, const float *scale, const LevelTable &table, const Ranker &ranks, std::uint8_t *codes,
                    float *error) {
    float scaled[kRows];
    std::int32_t rank[kRows];
    scale_rows_down(w, scale, scaled);
    ranks(scaled, rank, kRows);
    codes_of(table, scaled, rank, codes, kRows);
    left_of_levels(w, scale, table.levels, rank, error);
}

// Keeps large errors of column c apart, and pushes the rest onto the columns after it.
EVERY_VECTOR_UNIT
void push_error(const Strip &strip, std::int64_t c, std::int64_t cols, const float *factor) {
    float *error = strip.errors + c * kRows;
    if (strip.least != nullptr) {
        const float *least = strip.least + c * kRows;
        float *kept = strip.kept + c * kRows;
        for (std::int64_t r = 0; r < kRows; ++r) {
            kept[r] = std::fabs(error[r]) > least[r] ? as_half(error[r]) : 0.0f;
            error[r] -= kept[r];
        }
    }
    const float own = factor[c];
    for (std::int64_t r = 0; r < kRows; ++r) error[r] /= own;
    for (std::int64_t next = c + 1; next < cols; ++next) {
        const float weight = factor[next];
        float *open = strip.w + next * kRows;
        for (std::int64_t r = 0; r < kRows; ++r) open[r] -= error[r] * weight;
    }
}

void round_strip(const Strip &strip, std::int64_t cols, const float *factor, std::int64_t factor_stride, const ColumnLevels &levels,
                 const std::optional<Ranker> &ranks) {
    for (std::int64_t c = 0; c < cols; ++c) {
        const std::int64_t at = c * kRows;
        if (ranks) {
            round_to_table(strip.w + at, strip.scale + at, *levels.table, *ranks, strip.codes + at, strip.errors + at);
        } else {
            round_evenly(strip.w + at, strip.scale + at, strip.zero + at, levels.top, strip.codes + at, strip.errors + at);
        }
        push_error(strip, c, cols, factor + c * factor_stride);
    }
}

}  // namespace

void round_columns(float *w, std::uint8_t *codes, float *errors, std::int64_t cols, std::int64_t rows, const float *factor,
                   std::int64_t factor_stride, const ColumnLevels &levels, const KeptApart &apart, int threads) {
    const std::optional<Ranker> ranks = levels.table ? std::optional<Ranker>(*levels.table) : std::nullopt;
    const std::int64_t strips = (rows + kRows - 1) / kRows;
    const int used = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, strips)));
    parallel(used, [&](int index) {
        const auto size = static_cast<std::size_t>(cols * kRows);
        std::vector<float> values(size), pushed(size), scale(size), zero(size, levels.offset);
        std::vector<float> least(apart.least ? size : 0), kept(apart.least ? size : 0);
        std::vector<std::uint8_t> chosen(size);
        const Strip strip{values.data(), pushed.data(), chosen.data(), scale.data(), zero.data(),
                          apart.least ? least.data() : nullptr, kept.data()};
        for (std::int64_t s = index; s < strips; s += used) {
            const std::int64_t first = s * kRows, width = std::min(kRows, rows - first);
            for (std::int64_t c = 0; c < cols; ++c) {
                const float *from = w + c * rows + first;
                const std::int64_t at = levels.group[c] * rows + first;
                std::copy(from, from + width, strip.w + c * kRows);
                std::copy(levels.scale + at, levels.scale + at + width, strip.scale + c * kRows);
                if (levels.zero) std::copy(levels.zero + at, levels.zero + at + width, strip.zero + c * kRows);
                if (apart.least) {
                    const float *limits = apart.least + c * rows + first;
                    std::copy(limits, limits + width, strip.least + c * kRows);
                }
            }
            round_strip(strip, cols, factor, factor_stride, levels, ranks);
            for (std::int64_t c = 0; c < cols; ++c) {
                const std::int64_t at = c * rows + first;
                std::copy(strip.errors + c * kRows, strip.errors + c * kRows + width, errors + at);
                std::copy(strip.codes + c * kRows, strip.codes + c * kRows + width, codes + at);
                std::copy(strip.w + c * kRows, strip.w + c * kRows + width, w + at);
                if (apart.least) std::copy(strip.kept + c * kRows, strip.kept + c * kRows + width, apart.kept + at);
            }
        }
    });
}

}  // namespace bitpress
