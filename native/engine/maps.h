// What happens to a row of inputs before the terms of a layer meet it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace bitpress {

struct Kernels;

// One step of a map. `mix` multiplies every block by left ⊗ right: seen as a matrix [across, block / across], its columns by `left` and its
// rows by `right`.
struct MapStep {
    enum Kind { gather, scale, mix } kind = gather;
    std::vector<int32_t> order;        // gather: value j becomes x[order[j]]
    std::vector<float> values;         // scale: a factor a value
    int block = 0, across = 1;         // mix
    std::vector<float> left;           // [across, across]; none where across is 1
    std::vector<float> right;          // [along, along]; none for Walsh's matrix of this order, a power of two, without its factor
    bool operator==(const MapStep &) const = default;
};

constexpr int SIGNED_QUADS = 16;  // fours of rows whose sums with all signs stay in the first cache

// A mixing step as code paths take it.
struct Mixing {
    int across = 1, along = 1;
    const float *left = nullptr;       // [across, across]
    // Where left consists of ones and minus ones, for every row and every four of its columns: which of their sums it takes, in floats from
    // the sums of the first of SIGNED_QUADS fours. Bits of the number of a sum are 1 for minus, the lowest for the first column.
    const uint16_t *places = nullptr;  // [across, across / 4]
    const float *right = nullptr;      // [along, along], its row j goes with x[j]; null for Walsh's
};

// Maps that are equal are one object, so that layers with equal maps share what is made of an input.
class InputMap {
  public:
    // Gives the map of these steps, or null for none. The caller has checked that they fit a row of `columns`.
    static std::shared_ptr<const InputMap> of(int columns, std::vector<MapStep> steps);

    // `out` is another row than x.
    void apply(const Kernels &kernels, const float *x, float *out) const;
    // T' x: what a row of terms is as a row of weights.
    void apply_transposed(const Kernels &kernels, const float *x, float *out) const;

    const std::vector<MapStep> &steps() const { return steps_; }
    size_t bytes() const;

  private:
    InputMap(int columns, std::vector<MapStep> steps);
    // What a mixing step has beside its factors.
    struct Turned {
        std::vector<float> left, right;                  // transposed
        std::vector<uint16_t> places, places_of_turned;  // of left (Mixing)
    };
    Mixing mixing(size_t step, bool transposed) const;
    int columns_;
    size_t spare_;  // floats that a step works in
    std::vector<MapStep> steps_;
    std::vector<Turned> turned_;  // of every step
};

}  // namespace bitpress
