// What products need of their input, made once for all that read it.
#include <algorithm>
#include <cstring>

#include "products.h"

namespace bitpress {

Cut flat_cut(int columns) { return make_cut(columns, columns, chunk_of(8)); }

void Input::want(Form::Kind kind, const Cut &cut, const InputMap *map, const Linear *linear, const int32_t *picked) {
    for (size_t i = 0; i < used_; ++i) {
        if (forms_[i].is(kind, cut, map, linear, picked)) return;
    }
    if (used_ == forms_.size()) forms_.emplace_back();
    Form &form = forms_[used_++];
    form.kind = kind;
    form.cut = cut;
    form.map = map;
    form.linear = linear;
    form.picked = picked;
    if (kind == Form::direct) form.quantized.fit(cut, rows_);
    else if (kind == Form::tiled) form.tiles.fit(cut, rows_);
    else if (kind == Form::halved) form.halves.fit(cut, rows_);
    else {
        form.width = kind == Form::floats ? cut.padded() : kind == Form::inner ? linear->up.width() : cut.columns;
        form.values.resize(size_t(rows_) * form.width);
    }
}

void Input::plan(const Kernels &kernels, const std::vector<const Linear *> &linears, int rows, bool bytes) {
    if (rows == rows_ && bytes == bytes_ && linears == planned_) return;
    rows_ = rows;
    bytes_ = bytes;
    planned_.clear();
    used_ = 0;
    const bool few = rows <= MOST_ROWS;
    for (const Linear *linear : linears) {
        const InputMap *map = linear->map.get();
        Cut whole;
        whole.columns = linear->columns;
        // First, for the others are made of it.
        if (map != nullptr || !linear->dense.empty() || linear->sparse) want(Form::mapped, whole, map);
        for (const Coded &m : linear->coded) {
            const Form::Kind kind = !bytes || (few && !m.reads_bytes()) ? Form::floats : few ? Form::direct : many(kernels);
            want(kind, m.cut, map, nullptr, m.picked.data());
        }
        if (!linear->dense.empty() && bytes && !few) want(many(kernels), flat_cut(linear->columns), map);
        if (linear->down.any()) {
            whole.columns = linear->down.rows();
            want(Form::inner, whole, map, linear);
        }
    }
    planned_ = linears;
}

const Input::Form &Input::find(Form::Kind kind, const Cut &cut, const InputMap *map, const Linear *linear, const int32_t *picked) const {
    for (size_t i = 0; i < used_; ++i) {
        if (forms_[i].is(kind, cut, map, linear, picked)) return forms_[i];
    }
    __builtin_unreachable();
}

int64_t Input::apart() const {
    int64_t total = 0;
    for (size_t i = 0; i < used_; ++i) {
        if (forms_[i].kind != Form::tiled) continue;
        for (int row = 0; row < rows_; ++row) total += forms_[i].tiles.apart_counts[row];
    }
    return total;
}

int64_t Input::values() const {
    int64_t total = 0;
    for (size_t i = 0; i < used_; ++i) total += forms_[i].kind == Form::tiled ? int64_t(rows_) * forms_[i].cut.columns : 0;
    return total;
}

void add_factor(const Kernels &k, const Factor &m, int strip, const float *x, int rows, float *out) {
    if (m.coded) k.coded_floats(*m.coded, strip, x, m.width(), rows, out);
    else k.dense_floats(*m.dense, strip, x, m.width(), rows, out);
}

namespace {

// The inner vector of a low-rank term of one row, as the factor `up` reads it.
void reduce(const Kernels &k, const Linear &l, const float *x, float *to) {
    thread_local std::vector<float> wide, inner;
    if (l.down.coded) {
        wide.resize(size_t(l.down.width()));
        k.pad(x, l.down.coded->cut, wide.data());
        x = wide.data();
    }
    inner.assign(size_t(l.down.strips()) * STRIP, 0.0f);
    for (int s = 0; s < l.down.strips(); ++s) add_factor(k, l.down, s, x, 1, inner.data() + s * STRIP);
    if (l.up.coded) k.pad(inner.data(), l.up.coded->cut, to);
    else std::copy(inner.data(), inner.data() + l.down.rows(), to);
}

}  // namespace

void Input::prepare(const Kernels &kernels, const float *x, int row) {
    const auto mapped_row = [&](const InputMap *map) -> const float * {
        for (size_t i = 0; i < used_; ++i) {
            if (forms_[i].kind == Form::mapped && forms_[i].map == map) {
                return forms_[i].values.data() + size_t(row) * forms_[i].width;
            }
        }
        return x;
    };
    thread_local std::vector<float> few;
    const auto source = [&](const Form &form) -> const float * {
        const float *from = mapped_row(form.map);
        if (form.picked == nullptr) return from;
        few.resize(size_t(form.cut.columns));
        for (int c = 0; c < form.cut.columns; ++c) few[size_t(c)] = from[form.picked[c]];
        return few.data();
    };
    for (size_t i = 0; i < used_; ++i) {
        Form &form = forms_[i];
        if (form.kind == Form::mapped) {
            float *to = form.values.data() + size_t(row) * form.width;
            if (form.map == nullptr) std::memcpy(to, x, size_t(form.width) * sizeof(float));
            else form.map->apply(x, to);
        } else if (form.kind == Form::direct) {
            Quantized &q = form.quantized;
            kernels.quantize(source(form), q.cut, q.values.data() + size_t(row) * 2 * q.cut.padded(),
                             q.scales.data() + size_t(row) * q.cut.blocks(), q.sums.data() + size_t(row) * q.cut.blocks());
        } else if (form.kind == Form::tiled) {
            kernels.quantize_tiled(source(form), row, form.tiles);
        } else if (form.kind == Form::halved) {
            kernels.halve(source(form), row, form.halves);
        } else if (form.kind == Form::floats) {
            kernels.pad(source(form), form.cut, form.values.data() + size_t(row) * form.width);
        } else {
            reduce(kernels, *form.linear, source(form), form.values.data() + size_t(row) * form.width);
        }
    }
}

}  // namespace bitpress
