// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <vector>

namespace bitpress {

struct Sampling {
    float temperature = 0;         // 0: the most likely token
    int top_k = 0;                 // 0: all
    float top_p = 1, min_p = 0;
    float repetition_penalty = 1;  // on every token that has been before
};

// splitmix64: small, seedable, the same everywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    double uniform() {  // 0 <= u < 1
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return double((z ^ z >> 31) >> 11) * 0x1p-53;
    }

  private:
    uint64_t state_;
};

// The penalty comes first, then the temperature, then top-k, top-p and min-p, each on what the one before left.
int pick(const float *logits, int count, const std::vector<int32_t> &before, const Sampling &how, Random &random);

}  // namespace bitpress
