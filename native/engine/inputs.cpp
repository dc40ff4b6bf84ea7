// What products need of their input, made once for all that read it.
#include <algorithm>
#include <cstring>

#include "products.h"

namespace bitpress {

Cut flat_cut(int columns) { return make_cut(columns, columns, chunk_of(8)); }

void Input::want(const Kernels &kernels, const Key &key, bool passing) {
    const auto known = std::find_if(forms_.begin(), forms_.begin() + ptrdiff_t(used_), [&](const Form &form) { return form == key; });
    if (known != forms_.begin() + ptrdiff_t(used_)) {
        if (passing || !known->passing) return;
        known->passing = false;
        return known->values.resize(size_t(rows_) * known->width);
    }
    if (used_ == forms_.size()) forms_.emplace_back();
    Form &form = forms_[used_++];
    static_cast<Key &>(form) = key;
    form.width = 0, form.passing = passing;
    const Cut &cut = key.cut;
    if (key.kind == Key::direct) form.quantized.fit(cut, rows_);
    else if (key.kind == Key::tiled) form.tiles.fit(cut, rows_);
    else if (key.kind == Key::halved) form.halves.fit(cut, rows_);
    else if (key.kind == Key::integers) form.whole.fit(cut, rows_, rows_ <= MOST_ROWS ? 1 : kernels.integer_bytes);
    else {
        form.width = key.kind == Key::floats ? cut.padded() : key.kind == Key::inner ? key.linear->up.width() : cut.columns;
        if (!passing) form.values.resize(size_t(rows_) * form.width);
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
        const auto &rounding = linear->rounding;
        Cut whole;
        whole.columns = linear->columns;
        const bool floats = !linear->dense.empty() || linear->sparse;
        // First, for the others are made of it.
        const bool read = floats && !rounding;
        if (map != nullptr || read) want(kernels, {Key::mapped, whole, map}, !read);
        if (rounding && linear->reads_rounded_floats()) want(kernels, {Key::mapped, whole, map, nullptr, nullptr, rounding});
        for (const Coded &m : linear->coded) {
            const bool in_floats = !bytes || rounding || (few && !m.reads_bytes());
            want(kernels, key_of(in_floats ? Key::floats : few ? Key::direct : many(kernels), *linear, m));
        }
        if (!linear->dense.empty() && bytes && !few && !rounding) want(kernels, {many(kernels), flat_cut(linear->columns), map});
        if (linear->down.any()) {
            whole.columns = linear->down.rows();
            want(kernels, {Key::inner, whole, map, linear, nullptr, rounding});
        }
    }
    planned_ = linears;
}

const Input::Form &Input::find(const Key &key) const {
    for (size_t i = 0; i < used_; ++i) {
        if (forms_[i] == key) return forms_[i];
    }
    __builtin_unreachable();
}

int64_t Input::apart() const {
    int64_t total = 0;
    for (size_t i = 0; i < used_; ++i) {
        if (forms_[i].kind != Key::tiled) continue;
        for (int row = 0; row < rows_; ++row) total += forms_[i].tiles.apart_counts[row];
    }
    return total;
}

int64_t Input::values() const {
    int64_t total = 0;
    for (size_t i = 0; i < used_; ++i) total += forms_[i].kind == Key::tiled ? int64_t(rows_) * forms_[i].cut.columns : 0;
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

// The values that a row's codes stand for.
bool round_floats(const Kernels &k, const float *x, const Rounding &rounding, int columns, float *to) {
    thread_local IntegerRows codes;
    const Cut cut = make_cut(columns, rounding.run(), chunk_of(8));
    codes.fit(cut, 1, 1);
    const bool finite = k.round_row(x, 0, rounding, codes);
    for (int b = 0; b < cut.blocks(); ++b) {
        const int g = b / cut.blocks_per_group, first = cut.first_column(b);
        for (int c = 0; c < cut.columns_of(b); ++c) {
            to[first + c] = float(codes.values[size_t(b) * cut.width + c] - codes.less[size_t(g)]) * codes.scales[size_t(g)];
        }
    }
    return finite;
}

}  // namespace

const float *Input::row_of(const InputMap *map, const std::optional<Rounding> &rounding, const float *x, int row) {
    for (size_t i = 0; i < used_; ++i) {
        if (forms_[i].kind == Key::mapped && forms_[i].map == map && forms_[i].rounding == rounding) return place(i, row);
    }
    return x;
}

// Where a row of floats of a form is. A passing one is in this thread's cache from its making to its last use.
float *Input::place(size_t i, int row) {
    thread_local std::vector<Aligned<float>> passing;
    Form &form = forms_[i];
    if (form.width == 0) return nullptr;
    if (!form.passing) return form.values.data() + size_t(row) * form.width;
    if (passing.size() <= i) passing.resize(i + 1);
    passing[i].resize(size_t(form.width));
    return passing[i].data();
}

bool Input::prepare(const Kernels &kernels, const float *x, int row) {
    bool finite = true;
    thread_local std::vector<float> few;
    for (size_t i = 0; i < used_; ++i) {
        Form &form = forms_[i];
        float *to = place(i, row);
        const bool rounds = form.rounding && (form.kind == Key::integers || form.kind == Key::mapped);
        const float *from = form.kind == Key::mapped && !rounds ? x : row_of(form.map, rounds ? std::nullopt : form.rounding, x, row);
        if (form.picked != nullptr) {
            few.resize(size_t(form.cut.columns));
            for (int c = 0; c < form.cut.columns; ++c) few[size_t(c)] = from[form.picked[c]];
            from = few.data();
        }
        if (form.kind == Key::mapped) {
            if (rounds) finite = round_floats(kernels, from, *form.rounding, form.width, to) && finite;
            else if (form.map == nullptr) std::memcpy(to, x, size_t(form.width) * sizeof(float));
            else form.map->apply(kernels, x, to);
        } else if (form.kind == Key::direct) {
            Quantized &q = form.quantized;
            kernels.quantize(from, q.cut, q.values.data() + size_t(row) * 2 * q.cut.padded(),
                             q.scales.data() + size_t(row) * q.cut.blocks(), q.sums.data() + size_t(row) * q.cut.blocks());
        } else if (form.kind == Key::tiled) {
            kernels.quantize_tiled(from, row, form.tiles);
        } else if (form.kind == Key::halved) {
            kernels.halve(from, row, form.halves);
        } else if (form.kind == Key::integers) {
            finite = kernels.round_row(from, row, *form.rounding, form.whole) && finite;
        } else if (form.kind == Key::floats) {
            kernels.pad(from, form.cut, to);
        } else {
            reduce(kernels, *form.linear, from, to);
        }
    }
    return finite;
}

}  // namespace bitpress
