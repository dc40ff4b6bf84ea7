// The column loop of error feedback (GPTQ): round a column, push its error onto the columns that follow.
#pragma once

#include <cstdint>

#include "levels.h"

namespace bitpress {

// What a column is rounded to. Parameters are `[groups, rows]`.
struct ColumnLevels {
    const float *scale;
    const LevelTable *table;    // null: equally spaced levels, w_hat = (code - zero) * scale, codes 0 .. top
    const float *zero;          // null: `offset` for every group
    float offset;
    float top;
    const std::int64_t *group;  // `[cols]`: the row of parameters of each column
};

// Errors kept apart, in half precision, where they are larger than `least`; they are not fed back. Both `[cols, rows]`, or both null.
struct KeptApart {
    const float *least;
    float *kept;
};

// w [cols, rows]: weights with all earlier feedback in, changed on the way. codes, errors [cols, rows]: results.
// factor: upper triangle, row c at factor + c * factor_stride.
// Each row of the matrix is computed alone, in the same order whatever `threads` is.
void round_columns(float *w, std::uint8_t *codes, float *errors, std::int64_t cols, std::int64_t rows, const float *factor,
                   std::int64_t factor_stride, const ColumnLevels &levels, const KeptApart &apart, int threads);

}  // namespace bitpress
