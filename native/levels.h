// Levels from a table, times a scale: which of them is nearest.
#pragma once

#include <cstdint>

namespace bitpress {

// Levels in rising order with `boundaries` between them: a value above k boundaries gets levels[k] and code_of[k], k at most 255. A value
// with its sign bit set whose code is `zero_code` gets `negative_zero_code` (both -1 where there is no such code).
struct LevelTable {
    const float *boundaries;
    std::int64_t num_boundaries;
    const float *levels;
    const std::uint8_t *code_of;
    int zero_code;
    int negative_zero_code;
};

// The most values that a `Ranker` is asked for at a time: they stay in the first-level cache.
constexpr std::int64_t kRanked = 256;

// Counts the boundaries below each of `n` values that have been divided by their scale.
class Ranker {
  public:
    explicit Ranker(const LevelTable &table);
    void operator()(const float *scaled, std::int32_t *rank, std::int64_t n) const;

  private:
    float boundaries_[256];
    std::int64_t count_;
};

// The codes of values that have been ranked.
void codes_of(const LevelTable &table, const float *scaled, const std::int32_t *rank, std::uint8_t *codes, std::int64_t n);

// to[i] = from[i] / divisor, a divisor of 0 counting as 1.
void scale_down(const float *from, float *to, std::int64_t n, float divisor);

}  // namespace bitpress
