// How a model's own rounding turns rows of inputs into whole numbers: code = clamp(round(x / scale) + zero, 0, top), halves to even.
//
// A product of such codes with codes of weights is a sum of whole numbers, which every code path computes alike; it becomes a float once for
// the columns that share a scale of the weights and one of the inputs. `kernels/integers.py` is the law.
#pragma once

#include "per_block.h"

namespace bitpress {

constexpr int MOST_SUMMED = 1 << 15;  // columns of a sum of products of bytes in 32 bits

struct Rounding {
    int bits = 8;
    bool has_zero = false;             // codes have a zero point; without it, that is the middle
    int group = 0;                     // columns that share a scale
    ScaleKind kind = ScaleKind::f32;   // what a scale of a row's own is kept in: f32, f16 or bf16
    bool fixed = false;                // scale and zero point are those below, for every row
    float scale = 1;
    int zero = 0;

    bool operator==(const Rounding &) const = default;
    int top() const { return (1 << bits) - 1; }
    int middle() const { return 1 << (bits - 1); }
};

struct RoundingStep {
    float scale;
    int zero;
};

// The smallest scale that clips no value from -below to above (neither is negative), as `kind` keeps it, and its zero point.
RoundingStep fit_step(float below, float above, const Rounding &rounding);

}  // namespace bitpress
