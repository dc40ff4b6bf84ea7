#include "search.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include "half.h"
#include "share.h"
#include "vector_units.h"

namespace bitpress {

namespace {

// Sums go over lanes of a fixed number, so that every vector unit gives the same bits, and in pieces, so that long blocks lose nothing.
constexpr std::int64_t kLanes = 16, kPiece = 1024;

float as_bf16(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

// As the store keeps it: a block that is not all zeros keeps at least the smallest scale there is.
float stored_scale(float scale, const RangeSearch &search, std::int64_t block) {
    if (search.type == ScaleType::fp32) return scale;
    if (search.type == ScaleType::steps) {
        const float step = search.steps[block];
        if (!(scale > 0.0f && step > 0.0f)) return 0.0f;
        return std::clamp(std::nearbyint(scale / step), 1.0f, static_cast<float>(search.most)) * step;
    }
    const float rounded = search.type == ScaleType::fp16 ? as_half(scale) : as_bf16(scale);
    const float smallest = std::bit_cast<float>(search.type == ScaleType::fp16 ? 0x33800000u : 0x00010000u);  // 2^-24, 2^-133
    return rounded == 0.0f && scale > 0.0f ? smallest : rounded;
}

EVERY_VECTOR_UNIT
void find_range(const float *x, std::int64_t n, float &low, float &high) {
    float least[kLanes] = {}, most[kLanes] = {};
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        for (std::int64_t k = 0; k < kLanes; ++k) {
            least[k] = x[i + k] < least[k] ? x[i + k] : least[k];
            most[k] = x[i + k] > most[k] ? x[i + k] : most[k];
        }
    }
    for (std::int64_t i = whole; i < n; ++i) {
        least[0] = x[i] < least[0] ? x[i] : least[0];
        most[0] = x[i] > most[0] ? x[i] : most[0];
    }
    for (std::int64_t k = 1; k < kLanes; ++k) {
        least[0] = std::min(least[0], least[k]);
        most[0] = std::max(most[0], most[k]);
    }
    low = least[0];
    high = most[0];
}

struct Levels {
    float scale, zero, top;
};

inline float squared_error(float x, float divisor, const Levels &levels) {
    float code = std::nearbyint(x / divisor) + levels.zero;
    code = code < 0.0f ? 0.0f : code;
    code = code > levels.top ? levels.top : code;
    const float difference = (code - levels.zero) * levels.scale - x;
    return difference * difference;
}

EVERY_VECTOR_UNIT
double error_of(const float *x, const float *importance, std::int64_t n, const Levels &levels) {
    const float divisor = levels.scale == 0.0f ? 1.0f : levels.scale;
    double total = 0.0;
    for (std::int64_t start = 0; start < n; start += kPiece) {
        const std::int64_t last = std::min(start + kPiece, n), whole = start + (last - start) / kLanes * kLanes;
        float sums[kLanes] = {};
        if (importance) {
            for (std::int64_t i = start; i < whole; i += kLanes)
                for (std::int64_t k = 0; k < kLanes; ++k) sums[k] += squared_error(x[i + k], divisor, levels) * importance[i + k];
            for (std::int64_t i = whole; i < last; ++i) sums[0] += squared_error(x[i], divisor, levels) * importance[i];
        } else {
            for (std::int64_t i = start; i < whole; i += kLanes)
                for (std::int64_t k = 0; k < kLanes; ++k) sums[k] += squared_error(x[i + k], divisor, levels);
            for (std::int64_t i = whole; i < last; ++i) sums[0] += squared_error(x[i], divisor, levels);
        }
        for (std::int64_t k = 0; k < kLanes; ++k) total += static_cast<double>(sums[k]);
    }
    return total;
}

// The smallest scale that clips nothing of the range, and its zero point.
Levels levels_of(float low, float high, const RangeSearch &search) {
    const float top = static_cast<float>(search.top), half = static_cast<float>((search.top + 1) / 2);
    float scale, zero = half;
    if (search.with_zero) {
        scale = (high - low) / top;
        zero = scale > 0.0f ? std::clamp(std::nearbyint(-low / scale), 0.0f, top) : 0.0f;
    } else {
        scale = std::max(high / (half - 1.0f), -low / half);
    }
    return {scale, zero, top};
}

bool search_some(const RangeSearch &search, std::int64_t first, std::int64_t last, float *scale, float *zero) {
    bool good = true;
    const bool coarse = search.type == ScaleType::steps;
    for (std::int64_t b = first; b < last; ++b) {
        const float *x = search.values + b * search.n;
        const float *importance = search.importance ? search.importance + b * search.n : nullptr;
        float low, high;
        find_range(x, search.n, low, high);
        Levels best;
        double least = 0.0;
        const auto keep_better = [&](const Levels &trial) {
            good = good && std::isfinite(trial.scale);
            const double error = error_of(x, importance, search.n, trial);
            if (error < least) {
                least = error;
                best = trial;
            }
        };
        for (std::int64_t r = 0; r < search.num_ratios; ++r) {
            Levels trial = levels_of(low * search.ratios[r], high * search.ratios[r], search);
            const float wanted = trial.scale;
            trial.scale = stored_scale(wanted, search, b);
            if (r > 0) {
                keep_better(trial);
                continue;
            }
            good = good && std::isfinite(trial.scale);
            best = trial;
            if (search.num_ratios > 1 || coarse) least = error_of(x, importance, search.n, best);
            if (!coarse || trial.scale == 0.0f) continue;
            const float step = search.steps[b], code = std::nearbyint(trial.scale / step), nearest = trial.scale;
            for (const float by : {-1.0f, 1.0f}) {
                // Without a search, only the one on the other side of the scale that was wanted.
                if (search.num_ratios == 1 && (by < 0.0f ? nearest <= wanted : nearest >= wanted)) continue;
                trial.scale = std::clamp(code + by, 1.0f, static_cast<float>(search.most)) * step;
                keep_better(trial);
            }
        }
        scale[b] = best.scale;
        if (search.with_zero) zero[b] = best.zero;
    }
    return good;
}

// Of `blocks` blocks of `n` weights each, or of a piece of one, the squared errors added to what they had.
EVERY_VECTOR_UNIT
void add_errors(const float *x, const std::int32_t *rank, const float *importance, std::int64_t blocks, std::int64_t n,
                const float *scale, const float *levels, double *errors) {
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t start = b * n, whole = n / kLanes * kLanes;
        float sums[kLanes] = {};
        const auto error = [&](std::int64_t i) {
            const float difference = levels[rank[i]] * scale[b] - x[i];
            return importance ? difference * difference * importance[i] : difference * difference;
        };
        for (std::int64_t i = start; i < start + whole; i += kLanes)
            for (std::int64_t k = 0; k < kLanes; ++k) sums[k] += error(i + k);
        for (std::int64_t i = start + whole; i < start + n; ++i) sums[0] += error(i);
        for (std::int64_t k = 0; k < kLanes; ++k) errors[b] += static_cast<double>(sums[k]);
    }
}

void search_some(const ScaleSearch &search, const LevelTable &table, const Ranker &ranks, std::int64_t first, std::int64_t last,
                 float *scale) {
    // Short blocks together, long ones in pieces.
    const std::int64_t together = std::max<std::int64_t>(1, kRanked / std::max<std::int64_t>(search.n, 1));
    const std::int64_t piece = std::min(search.n, kRanked);
    float scaled[kRanked];
    std::int32_t rank[kRanked];
    double errors[kRanked], least[kRanked];
    for (std::int64_t b = first; b < last; b += together) {
        const std::int64_t count = std::min(together, last - b);
        for (std::int64_t t = 0; t < search.num_trials; ++t) {
            const float *trial = search.trials + t * search.blocks + b;
            std::fill(errors, errors + count, 0.0);
            for (std::int64_t start = 0; start < search.n; start += piece) {
                const std::int64_t here = std::min(piece, search.n - start), from = b * search.n + start;
                for (std::int64_t i = 0; i < count; ++i) scale_down(search.values + from + i * here, scaled + i * here, here, trial[i]);
                ranks(scaled, rank, count * here);
                add_errors(search.values + from, rank, search.importance ? search.importance + from : nullptr, count, here, trial,
                           table.levels, errors);
            }
            for (std::int64_t i = 0; i < count; ++i) {
                if (t == 0 || errors[i] < least[i]) {
                    least[i] = errors[i];
                    scale[b + i] = trial[i];
                }
            }
        }
    }
}

}  // namespace

void search_scales(const ScaleSearch &search, const LevelTable &table, float *scale, int threads) {
    const Ranker ranks(table);
    share(search.blocks, search.n * search.num_trials, threads,
          [&](std::int64_t first, std::int64_t last) { search_some(search, table, ranks, first, last, scale); });
}

bool search_ranges(const RangeSearch &search, float *scale, float *zero, int threads) {
    std::atomic<bool> good = true;
    share(search.blocks, search.n * search.num_ratios, threads, [&](std::int64_t first, std::int64_t last) {
        if (!search_some(search, first, last, scale, zero)) good = false;
    });
    return good;
}

}  // namespace bitpress
