#include "maps.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "../vector_units.h"

namespace bitpress {

namespace {

std::vector<float> transpose(const std::vector<float> &m, int order) {
    std::vector<float> turned(m.size());
    if (m.empty()) return turned;
    for (int i = 0; i < order; ++i) {
        for (int j = 0; j < order; ++j) turned[size_t(j) * order + i] = m[size_t(i) * order + j];
    }
    return turned;
}

#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Places __attribute__((vector_size(4 * LANES)));

// Inlined everywhere, so that no vector is ever passed to a function; GCC warns of the calling convention all the same.
#pragma GCC diagnostic ignored "-Wpsabi"

INLINE Vector load(const float *x) {
    Vector v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

INLINE void store(float *x, Vector v) { std::memcpy(x, &v, sizeof v); }

// Sums and differences of values that are `HALF` places apart in a vector.
template <int HALF> INLINE Vector butterfly(Vector v) {
    Places other;
    Vector sign;
    for (int i = 0; i < LANES; ++i) other[i] = i ^ HALF, sign[i] = i & HALF ? -1.0f : 1.0f;
    return __builtin_shuffle(v, other) + sign * v;
}

// A row times Walsh's matrix, in place; the order is a power of two.
INLINE void walsh(float *x, int n) {
    int half = 1;
    if (n >= LANES) {
        for (int i = 0; i < n; i += LANES) store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))))));
        half = LANES;
    }
    for (; half < n; half *= 2) {
        for (int start = 0; start < n; start += 2 * half) {
            float *a = x + start, *b = a + half;
            if (half >= LANES) {
                for (int i = 0; i < half; i += LANES) {
                    const Vector p = load(a + i), q = load(b + i);
                    store(a + i, p + q), store(b + i, p - q);
                }
                continue;
            }
            for (int i = 0; i < half; ++i) {
                const float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum, b[i] = difference;
            }
        }
    }
}

// `COUNT` rows of a @ b from `column` on, a vector wide; b is [inner, width].
template <int COUNT> INLINE void multiply_strip(const float *a, const float *b, float *out, int inner, int width, int column) {
    Vector sums[COUNT] = {};
    for (int k = 0; k < inner; ++k) {
        const Vector row = load(b + size_t(k) * width + column);
        for (int i = 0; i < COUNT; ++i) sums[i] += a[size_t(i) * inner + k] * row;
    }
    for (int i = 0; i < COUNT; ++i) store(out + size_t(i) * width + column, sums[i]);
}

// out = a @ b: [rows, inner] times [inner, width].
INLINE void multiply(const float *a, const float *b, float *out, int rows, int inner, int width) {
    constexpr int TOGETHER = 8;
    if (width < LANES) {
        for (int i = 0; i < rows; ++i) {
            for (int c = 0; c < width; ++c) {
                float sum = 0;
                for (int k = 0; k < inner; ++k) sum += a[size_t(i) * inner + k] * b[size_t(k) * width + c];
                out[size_t(i) * width + c] = sum;
            }
        }
        return;
    }
    for (int from = 0; from < width; from += LANES) {
        const int column = std::min(from, width - LANES);  // the last strip may overlap the one before
        int i = 0;
        for (; i + TOGETHER <= rows; i += TOGETHER) {
            multiply_strip<TOGETHER>(a + size_t(i) * inner, b, out + size_t(i) * width, inner, width, column);
        }
        for (; i + 4 <= rows; i += 4) multiply_strip<4>(a + size_t(i) * inner, b, out + size_t(i) * width, inner, width, column);
        for (; i < rows; ++i) multiply_strip<1>(a + size_t(i) * inner, b, out + size_t(i) * width, inner, width, column);
    }
}

// One block, in place. `left` is [across, across] or null, `right` [along, along], turned so that its row j goes with x[j], or null for
// Walsh's. `spare` has room for the block.
EVERY_VECTOR_UNIT void mix_block(float *x, float *spare, const float *left, int across, const float *right, int along) {
    const size_t bytes = size_t(across) * along * sizeof(float);
    if (right == nullptr) {
        for (int i = 0; i < across; ++i) walsh(x + size_t(i) * along, along);
    } else {
        multiply(x, right, spare, across, along, along);
        std::memcpy(x, spare, bytes);
    }
    if (left == nullptr) return;
    multiply(left, x, spare, across, across, along);
    std::memcpy(x, spare, bytes);
}

const float *data_of(const std::vector<float> &m) { return m.empty() ? nullptr : m.data(); }

}  // namespace

InputMap::InputMap(int columns, std::vector<MapStep> steps) : columns_(columns), steps_(std::move(steps)) {
    for (const MapStep &step : steps_) {
        const int along = step.kind == MapStep::mix ? step.block / step.across : 0;
        turned_.push_back({transpose(step.left, step.across), transpose(step.right, along)});
    }
}

std::shared_ptr<const InputMap> InputMap::of(int columns, std::vector<MapStep> steps) {
    if (steps.empty()) return nullptr;
    static std::mutex mutex;
    static std::vector<std::weak_ptr<const InputMap>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    std::erase_if(known, [](const auto &entry) { return entry.expired(); });
    for (const auto &entry : known) {
        auto map = entry.lock();
        if (map && map->columns_ == columns && map->steps_ == steps) return map;
    }
    std::shared_ptr<const InputMap> made(new InputMap(columns, std::move(steps)));
    known.push_back(made);
    return made;
}

void InputMap::apply(const float *x, float *out) const {
    thread_local std::vector<float> spare;
    spare.resize(size_t(columns_));
    bool first = true;
    for (size_t i = 0; i < steps_.size(); ++i, first = false) {
        const MapStep &step = steps_[i];
        if (step.kind == MapStep::gather) {
            const float *from = x;
            if (!first) from = static_cast<const float *>(std::memcpy(spare.data(), out, size_t(columns_) * sizeof(float)));
            for (int c = 0; c < columns_; ++c) out[c] = from[step.order[size_t(c)]];
        } else if (step.kind == MapStep::scale) {
            const float *from = first ? x : out;
            for (int c = 0; c < columns_; ++c) out[c] = from[c] * step.values[size_t(c)];
        } else {
            if (first) std::memcpy(out, x, size_t(columns_) * sizeof(float));
            for (int at = 0; at < columns_; at += step.block) {
                mix_block(out + at, spare.data(), data_of(step.left), step.across, data_of(turned_[i].right), step.block / step.across);
            }
        }
    }
}

void InputMap::apply_transposed(const float *x, float *out) const {
    std::vector<float> spare(static_cast<size_t>(columns_));
    std::memcpy(out, x, size_t(columns_) * sizeof(float));
    for (size_t i = steps_.size(); i-- > 0;) {
        const MapStep &step = steps_[i];
        if (step.kind == MapStep::gather) {
            std::memcpy(spare.data(), out, size_t(columns_) * sizeof(float));
            for (int c = 0; c < columns_; ++c) out[step.order[size_t(c)]] = spare[size_t(c)];
        } else if (step.kind == MapStep::scale) {
            for (int c = 0; c < columns_; ++c) out[c] *= step.values[size_t(c)];
        } else {
            for (int at = 0; at < columns_; at += step.block) {
                mix_block(out + at, spare.data(), data_of(turned_[i].left), step.across, data_of(step.right), step.block / step.across);
            }
        }
    }
}

size_t InputMap::bytes() const {
    size_t total = 0;
    for (const MapStep &step : steps_) {
        total += step.order.size() * 4 + (step.values.size() + 2 * step.left.size() + 2 * step.right.size()) * sizeof(float);
    }
    return total;
}

}  // namespace bitpress
