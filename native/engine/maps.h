// What happens to a row of inputs before the terms of a layer meet it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace bitpress {

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

// Maps that are equal are one object, so that layers with equal maps share what is made of an input.
class InputMap {
  public:
    // Gives the map of these steps, or null for none. The caller has checked that they fit a row of `columns`.
    static std::shared_ptr<const InputMap> of(int columns, std::vector<MapStep> steps);

    void apply(const float *x, float *out) const;
    // T' x: what a row of terms is as a row of weights.
    void apply_transposed(const float *x, float *out) const;

    const std::vector<MapStep> &steps() const { return steps_; }
    size_t bytes() const;

  private:
    InputMap(int columns, std::vector<MapStep> steps);
    struct Turned {
        std::vector<float> left, right;  // transposed
    };
    int columns_;
    std::vector<MapStep> steps_;
    std::vector<Turned> turned_;  // of every step
};

}  // namespace bitpress
