// Single rows of weights in float, slowly: an embedding's look-up, and what tests compare products with.
#include <algorithm>
#include <vector>

#include "halves.h"
#include "kernels.h"
#include "matrix.h"

namespace bitpress {

void Linear::row(int r, float *out) const {
    if (out_map == nullptr) return inner_row(r, out);
    std::vector<float> unit(size_t(rows), 0.0f), factors(static_cast<size_t>(rows)), each(static_cast<size_t>(columns));
    unit[size_t(r)] = 1.0f;
    out_map->apply_transposed(choose_kernels(nullptr), unit.data(), factors.data());
    std::fill(out, out + columns, 0.0f);
    for (int k = 0; k < rows; ++k) {
        if (factors[size_t(k)] == 0.0f) continue;
        inner_row(k, each.data());
        for (int c = 0; c < columns; ++c) out[c] += factors[size_t(k)] * each[size_t(c)];
    }
}

namespace {

void add_dense_row(const Dense &m, int r, float factor, float *to) {
    const float gain = m.gain.size() ? m.gain[r] : 1.0f;
    for (int c = 0; c < m.columns; ++c) {
        const uint16_t value = m.strip(r / STRIP)[size_t(c) * STRIP + r % STRIP];
        to[c] += factor * (gain * (m.half ? from_f16(value) : from_bf16(value)));
    }
}

void add_coded_row(const Coded &m, int r, float factor, float *to) {
    if (!m.fast()) {  // a whole strip of them, as products decode it
        std::vector<float> panel(size_t(m.cut.padded()) * STRIP);
        choose_kernels(nullptr).decode_coded(m, r / STRIP, panel.data());
        for (int b = 0; b < m.cut.blocks(); ++b) {
            const float *from = panel.data() + size_t(b) * m.cut.width * STRIP + r % STRIP;
            for (int c = 0; c < m.cut.columns_of(b); ++c) to[m.column(m.cut.first_column(b) + c)] += factor * from[size_t(c) * STRIP];
        }
        return;
    }
    for (int c = 0; c < m.cut.columns; ++c) {
        const int g = c / m.cut.group, code = code_at(m, r, c);
        const float scale = scale_at(m.scales, r, g) * m.gain;
        const float value = m.kind == CodeKind::table ? m.levels[code] : float(code - (m.zeros.any() ? int(m.zeros.code(r, g)) : m.zero));
        const float less = m.less.any() ? scale_at(m.less.scales, r, g) * m.less.gain : 0.0f;
        to[m.column(c)] += factor * (m.less.of_codes ? (value - less) * scale : value * scale - less);
    }
}

}  // namespace

void Factor::add_row(int r, float factor, float *to) const {
    if (coded) add_coded_row(*coded, r, factor, to);
    else add_dense_row(*dense, r, factor, to);
}

void Linear::inner_row(int r, float *out) const {
    std::vector<float> terms(size_t(columns), 0.0f);
    for (const Coded &m : coded) add_coded_row(m, r, 1.0f, terms.data());
    for (const Dense &m : dense) add_dense_row(m, r, 1.0f, terms.data());
    if (up.any()) {
        std::vector<float> factors(size_t(up.columns()), 0.0f);
        up.add_row(r, 1.0f, factors.data());
        for (int k = 0; k < up.columns(); ++k) down.add_row(k, factors[size_t(k)], terms.data());
    }
    if (sparse) {
        for (int64_t i = sparse->starts[r]; i < sparse->starts[r + 1]; ++i) terms[sparse->column(i)] += sparse->value(i);
    }
    if (map) map->apply_transposed(choose_kernels(nullptr), terms.data(), out);
    else std::copy(terms.begin(), terms.end(), out);
}

}  // namespace bitpress
