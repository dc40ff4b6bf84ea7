// The bytes that stand for words and levels in products of bytes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "halves.h"
#include "matrix.h"

namespace bitpress {

namespace {

// The step whose multiples are nearest to values, of the steps that are a part of the largest magnitude: 127 parts at most.
float nearest_step(const std::vector<float> &values, float most) {
    constexpr size_t FEW = 512;
    if (most <= 0 || values.size() > FEW) return most > 0 ? most / 127 : 1.0f;
    float best = most / 127, least = std::numeric_limits<float>::infinity();
    for (int top = 1; top <= 127; ++top) {
        const float step = most / float(top);
        float missed = 0;
        for (float v : values) missed = std::max(missed, std::fabs(std::nearbyint(v / step) * step - v));
        if (missed < least * 0.999f) least = missed, best = step;
    }
    return best;
}

uint8_t near_byte(float value, float step) { return uint8_t(128 + std::lrint(std::clamp(value / step, -127.0f, 127.0f))); }

}  // namespace

bool Coded::staged_in_bytes() const {
    if (fine) return kind <= CodeKind::table && group % 4 == 0;
    if (fast()) return false;
    if (packing == Packing::trits) return kind <= CodeKind::table;
    return near_words.size() || near_levels.size() || kind == CodeKind::e8p || kind == CodeKind::trellis || (kind == CodeKind::own && bits <= 4);
}

void Coded::find_near() {
    if (fine) return;
    if (kind == CodeKind::e8p) step = 0.25f;
    const bool finite = std::all_of(levels.data(), levels.data() + levels.size(), [](float v) { return std::isfinite(v); });
    if (kind == CodeKind::levels && bits <= 4 && which.bits <= 4 && finite) {
        const std::vector<float> all(levels.data(), levels.data() + levels.size());
        float most = 0;
        for (float v : all) most = std::max(most, std::fabs(v));
        step = nearest_step(all, most);
        near_levels.resize(all.size() >> bits << 4);
        for (size_t i = 0; i < all.size(); ++i) near_levels[i >> bits << 4 | (i & (level_count() - 1))] = near_byte(all[i], step);
    }
    if (kind != CodeKind::words || (span != 2 && span != 4 && span != 8)) return;
    const size_t in_book = size_t(span) << word_bits;
    std::vector<float> all(in_book * size_t(books));
    float most = 0;
    for (int book = 0; book < books; ++book) {
        float top = 0;
        for (size_t i = book * in_book; i < (book + 1) * in_book; ++i) {
            all[i] = halves.size() ? from_f16(halves[i]) : words[i];
            if (!std::isfinite(all[i])) return;
            top = std::max(top, std::fabs(all[i]));
        }
        most += top;
    }
    step = nearest_step(all, most);
    if (span == 2 && books == 1 && word_bits <= 8 && bits <= 8) {  // the two numbers of every word apart, for shuffles
        const size_t count = std::max<size_t>(16, size_t(1) << word_bits);
        near_levels.resize(2 * count);
        for (size_t i = 0; i < all.size(); ++i) near_levels[i % 2 * count + i / 2] = near_byte(all[i], step);
        return;
    }
    const size_t pieces = span <= 4 ? 1 : 2;
    near_words.resize((all.size() / size_t(span)) * pieces);
    for (size_t i = 0; i < near_words.size() * 4; ++i) {
        const size_t at = span == 2 ? i / 4 * 2 + i % 2 : i;
        // Of several books only the first has the zero of 128.
        const uint8_t byte = uint8_t(near_byte(all[at], step) - (at >= in_book ? 128 : 0));
        near_words[i / 4] |= uint32_t(byte) << i % 4 * 8;
    }
}

}  // namespace bitpress
