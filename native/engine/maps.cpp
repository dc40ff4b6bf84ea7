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

// A row times Walsh's matrix, in place.
inline __attribute__((always_inline)) void walsh(float *x, int n) {
    for (int half = 1; half < n; half *= 2) {
        for (int start = 0; start < n; start += 2 * half) {
            float *a = x + start, *b = a + half;
            for (int i = 0; i < half; ++i) {
                const float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum, b[i] = difference;
            }
        }
    }
}

// out[i] = sum of by[i][j] x[j] over rows of `width` values.
inline __attribute__((always_inline)) void combine(const float *by, const float *x, float *out, int rows, int width) {
    constexpr int PIECE = 64;
    for (int from = 0; from < width; from += PIECE) {
        const int n = std::min(PIECE, width - from);
        for (int i = 0; i < rows; ++i) {
            float sums[PIECE] = {};
            for (int j = 0; j < rows; ++j) {
                const float factor = by[size_t(i) * rows + j];
                const float *row = x + size_t(j) * width + from;
                if (n == PIECE) {
                    for (int c = 0; c < PIECE; ++c) sums[c] += factor * row[c];
                } else {
                    for (int c = 0; c < n; ++c) sums[c] += factor * row[c];
                }
            }
            std::memcpy(out + size_t(i) * width + from, sums, size_t(n) * sizeof(float));
        }
    }
}

// One block, in place. `left` is [across, across] or null, `right` [along, along], turned so that its row j goes with x[j], or null for
// Walsh's. `spare` has room for the block.
EVERY_VECTOR_UNIT void mix_block(float *x, float *spare, const float *left, int across, const float *right, int along) {
    if (right == nullptr) {
        for (int i = 0; i < across; ++i) walsh(x + size_t(i) * along, along);
    } else {
        for (int i = 0; i < across; ++i) {
            float *to = spare + size_t(i) * along;
            std::memset(to, 0, size_t(along) * sizeof(float));
            for (int j = 0; j < along; ++j) {
                const float value = x[size_t(i) * along + j];
                const float *row = right + size_t(j) * along;
                for (int c = 0; c < along; ++c) to[c] += value * row[c];
            }
        }
        std::memcpy(x, spare, size_t(across) * along * sizeof(float));
    }
    if (left == nullptr) return;
    combine(left, x, spare, across, along);
    std::memcpy(x, spare, size_t(across) * along * sizeof(float));
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
