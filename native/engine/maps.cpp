#include "maps.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "kernels.h"

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

// Which sums of four columns every row takes (Mixing), or none for a matrix of other numbers than ones and minus ones.
std::vector<uint16_t> places_of(const std::vector<float> &m, int order) {
    const bool signs = std::all_of(m.begin(), m.end(), [](float v) { return v == 1.0f || v == -1.0f; });
    if (m.empty() || order % 4 != 0 || !signs) return {};
    const int quads = order / 4;
    std::vector<uint16_t> places(size_t(order) * quads);
    for (int i = 0; i < order; ++i) {
        for (int q = 0; q < quads; ++q) {
            int which = 0;
            for (int k = 0; k < 4; ++k) which |= (m[size_t(i) * order + 4 * q + k] < 0) << k;
            places[size_t(i) * quads + q] = uint16_t((q % SIGNED_QUADS * 16 + which) * STRIP);
        }
    }
    return places;
}

template <class T> const T *data_of(const std::vector<T> &m) { return m.empty() ? nullptr : m.data(); }

}  // namespace

InputMap::InputMap(int columns, std::vector<MapStep> steps) : columns_(columns), spare_(size_t(columns)), steps_(std::move(steps)) {
    for (const MapStep &step : steps_) {
        const bool mixes = step.kind == MapStep::mix;
        const int across = mixes ? step.across : 0, along = mixes ? step.block / step.across : 0;
        std::vector<float> left = transpose(step.left, across);
        std::vector<uint16_t> places = places_of(step.left, across), places_of_turned = places_of(left, across);
        turned_.push_back({std::move(left), transpose(step.right, along), std::move(places), std::move(places_of_turned)});
        if (mixes && along < STRIP) spare_ = std::max(spare_, size_t(across) * 2 * STRIP);
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

Mixing InputMap::mixing(size_t step, bool transposed) const {
    const MapStep &s = steps_[step];
    const Turned &t = turned_[step];
    const std::vector<uint16_t> &places = transposed ? t.places_of_turned : t.places;
    return {s.across, s.block / s.across, data_of(transposed ? t.left : s.left), data_of(places), data_of(transposed ? s.right : t.right)};
}

void InputMap::apply(const Kernels &kernels, const float *x, float *out) const {
    thread_local Aligned<float> spare;
    if (spare.size() < spare_) spare.resize(spare_);
    const float *from = x;
    for (size_t i = 0; i < steps_.size(); ++i, from = out) {
        const MapStep &step = steps_[i];
        const bool mixes_next = i + 1 < steps_.size() && steps_[i + 1].kind == MapStep::mix;
        if (step.kind == MapStep::gather) {
            if (from == out) from = static_cast<const float *>(std::memcpy(spare.data(), out, size_t(columns_) * sizeof(float)));
            for (int c = 0; c < columns_; ++c) out[c] = from[step.order[size_t(c)]];
        } else if (step.kind == MapStep::mix) {
            kernels.mix(mixing(i, false), from, nullptr, out, columns_, spare.data());
        } else if (mixes_next) {
            ++i;
            kernels.mix(mixing(i, false), from, step.values.data(), out, columns_, spare.data());
        } else {
            for (int c = 0; c < columns_; ++c) out[c] = from[c] * step.values[size_t(c)];
        }
    }
}

void InputMap::apply_transposed(const Kernels &kernels, const float *x, float *out) const {
    std::vector<float> spare(spare_);
    std::memcpy(out, x, size_t(columns_) * sizeof(float));
    for (size_t i = steps_.size(); i-- > 0;) {
        const MapStep &step = steps_[i];
        if (step.kind == MapStep::gather) {
            std::memcpy(spare.data(), out, size_t(columns_) * sizeof(float));
            for (int c = 0; c < columns_; ++c) out[step.order[size_t(c)]] = spare[size_t(c)];
        } else if (step.kind == MapStep::scale) {
            for (int c = 0; c < columns_; ++c) out[c] *= step.values[size_t(c)];
        } else {
            kernels.mix(mixing(i, true), out, nullptr, out, columns_, spare.data());
        }
    }
}

size_t InputMap::bytes() const {
    size_t total = 0;
    for (size_t i = 0; i < steps_.size(); ++i) {
        const MapStep &step = steps_[i];
        total += step.order.size() * 4 + (step.values.size() + 2 * step.left.size() + 2 * step.right.size()) * sizeof(float);
        total += (turned_[i].places.size() + turned_[i].places_of_turned.size()) * sizeof(uint16_t);
    }
    return total;
}

}  // namespace bitpress
