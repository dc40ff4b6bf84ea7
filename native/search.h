// The scale of every block of weights, searched by the squared error it leaves.
#pragma once

#include <cstdint>

#include "levels.h"

namespace bitpress {

// How a scale is kept: rounded to a half float, to a bfloat16, as it is, or as a multiple of its block's step, 1 to `most` of it.
enum class ScaleType { fp16, bf16, fp32, steps };

// `[blocks, n]` finite weights, and of each what its squared error counts (null: alike). Every ratio is tried as a factor on the block's
// range, the first of the best kept. For the first ratio the steps beside the nearest are tried too, or if there is no other ratio the one
// beyond the scale that was wanted. Without a zero point levels are -half .. half - 1 times the scale, half = (top + 1) / 2.
struct RangeSearch {
    const float *values;
    const float *importance;
    std::int64_t blocks, n;
    const float *ratios;
    std::int64_t num_ratios;
    int top;
    bool with_zero;
    ScaleType type;
    const float *steps;  // of every block; a step of 0 leaves scales of 0
    int most;
};

// Evenly spaced levels. Says whether every scale that was tried could be kept. `zero` is written only with a zero point.
bool search_ranges(const RangeSearch &search, float *scale, float *zero, int threads);

// `[blocks, n]` finite weights, what the squared error of each counts (null: alike), and scales `[trials, blocks]` as they will be kept.
struct ScaleSearch {
    const float *values;
    const float *importance;
    std::int64_t blocks, n;
    const float *trials;
    std::int64_t num_trials;
};

// Levels from a table: gives each block the first of its best scales.
void search_scales(const ScaleSearch &search, const LevelTable &table, float *scale, int threads);

}  // namespace bitpress
