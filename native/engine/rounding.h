// How a model's own rounding turns rows of inputs into whole numbers: code = clamp(round(x / scale) + zero, 0, top), halves to even.
//
// A product of such codes with codes of weights is a sum of whole numbers, which every code path computes alike; it becomes a float once for
// the columns that share a scale of the weights and one of the inputs. `kernels/integers.py` is the law.
#pragma once

#include <algorithm>
#include <numeric>

#include "per_block.h"

namespace bitpress {

constexpr int MOST_SUMMED = 1 << 15;  // columns of a sum of products of bytes in 32 bits

// The codes of some columns.
struct CodeRange {
    int bits = 8;
    bool has_zero = false;             // codes have a zero point; without it, that is the middle
    int group = 0;                     // columns that share a scale
    ScaleKind kind = ScaleKind::f32;   // what a scale of a row's own is kept in: f32, f16 or bf16

    bool operator==(const CodeRange &) const = default;
    int top() const { return (1 << bits) - 1; }
    int middle() const { return 1 << (bits - 1); }
};

// The range is that of all columns, or of those behind the first ones.
struct Rounding : CodeRange {
    bool fixed = false;                // scale and zero point are those below, for every row
    float scale = 1;
    int zero = 0;
    int first = 0;                     // leading columns that have a range of their own
    CodeRange leading;

    bool operator==(const Rounding &) const = default;
    const CodeRange &range_of(int column) const { return column < first ? leading : *this; }
    // Where the columns that share a scale with this one begin and end.
    int begin_of(int column) const {
        return column < first ? column / leading.group * leading.group : first + (column - first) / group * group;
    }
    int end_of(int column, int columns) const {
        return std::min(begin_of(column) + range_of(column).group, column < first ? first : columns);
    }
    // Columns of which the groups of both ranges consist.
    int run() const { return first == 0 ? group : std::gcd(first, std::gcd(leading.group, group)); }
};

struct RoundingStep {
    float scale;
    int zero;
};

// The smallest scale that clips no value from -below to above (neither is negative), as `kind` keeps it, and its zero point.
RoundingStep fit_step(float below, float above, const CodeRange &range);

}  // namespace bitpress
