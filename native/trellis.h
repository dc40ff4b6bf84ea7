// The best path through a trellis: codes of a sequence whose values depend on the codes before them.
#pragma once

#include <cstdint>

namespace bitpress {

// A state is the newest `state_bits` bits of all codes so far; code i adds `shifts[i % period]` bits at the low end.
// `levels` [2^state_bits] holds the value of every state. A sequence begins in state 0.
struct Trellis {
    int state_bits;
    const std::int32_t *shifts;
    int period;
    const float *levels;
};

// Bits that a code may add.
constexpr int kMostShift = 8;

// Finds the path that minimises  sum of weights[i] * (values[i] - levels[state i])^2  and returns its new bits, one entry a value.
// values, weights, codes [sequences, length]; without weights (null) all are 1.
// Sequences are shared out among the threads; where there are fewer of them, several threads search one path, some states each. Every cost
// is computed alone, so the result is the same whatever `threads` is. Of equal paths the one of the lower states wins.
void encode_trellis(const float *values, const float *weights, std::uint8_t *codes, std::int64_t sequences, std::int64_t length,
                    const Trellis &trellis, int threads);

}  // namespace bitpress
