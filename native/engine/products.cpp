#include "products.h"

#include <algorithm>
#include <cstring>

namespace bitpress {

namespace {

Cut flat_cut(int columns) { return make_cut(columns, columns, chunk_of(8)); }

}  // namespace

void Input::want(Form::Kind kind, const Cut &cut, const InputMap *map, const Linear *linear) {
    for (size_t i = 0; i < used_; ++i) {
        const Form &form = forms_[i];
        if (form.kind == kind && form.cut == cut && form.map == map && form.linear == linear) return;
    }
    if (used_ == forms_.size()) forms_.emplace_back();
    Form &form = forms_[used_++];
    form.kind = kind;
    form.cut = cut;
    form.map = map;
    form.linear = linear;
    if (kind == Form::direct) form.quantized.fit(cut, rows_);
    else if (kind == Form::tiled) form.tiles.fit(cut, rows_);
    else if (kind == Form::halved) form.halves.fit(cut, rows_);
    else {
        form.width = kind == Form::floats ? cut.padded() : cut.columns;
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
            want(!bytes || (few && !m.reads_bytes()) ? Form::floats : few ? Form::direct : many(kernels), m.cut, map);
        }
        if (!linear->dense.empty() && bytes && !few) want(many(kernels), flat_cut(linear->columns), map);
        if (linear->down) {
            whole.columns = linear->down->rows;
            want(Form::inner, whole, map, linear);
        }
    }
    planned_ = linears;
}

const Input::Form &Input::find(Form::Kind kind, const Cut &cut, const InputMap *map, const Linear *linear) const {
    for (size_t i = 0; i < used_; ++i) {
        const Form &form = forms_[i];
        if (form.kind == kind && form.cut == cut && form.map == map && form.linear == linear) return form;
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

void Input::prepare(const Kernels &kernels, const float *x, int row) {
    auto source = [&](const InputMap *map) -> const float * {
        for (size_t i = 0; i < used_; ++i) {
            if (forms_[i].kind == Form::mapped && forms_[i].map == map) {
                return forms_[i].values.data() + size_t(row) * forms_[i].width;
            }
        }
        return x;
    };
    for (size_t i = 0; i < used_; ++i) {
        Form &form = forms_[i];
        if (form.kind == Form::mapped) {
            float *to = form.values.data() + size_t(row) * form.width;
            if (form.map == nullptr) std::memcpy(to, x, size_t(form.width) * sizeof(float));
            else form.map->apply(x, to);
        } else if (form.kind == Form::direct) {
            Quantized &q = form.quantized;
            kernels.quantize(source(form.map), q.cut, q.values.data() + size_t(row) * 2 * q.cut.padded(),
                             q.scales.data() + size_t(row) * q.cut.blocks(), q.sums.data() + size_t(row) * q.cut.blocks());
        } else if (form.kind == Form::tiled) {
            kernels.quantize_tiled(source(form.map), row, form.tiles);
        } else if (form.kind == Form::halved) {
            kernels.halve(source(form.map), row, form.halves);
        } else if (form.kind == Form::floats) {
            kernels.pad(source(form.map), form.cut, form.values.data() + size_t(row) * form.width);
        } else {
            const Dense &down = *form.linear->down;
            const float *from = source(form.map);
            float *to = form.values.data() + size_t(row) * form.width;
            for (int s = 0; s < down.strips(); ++s) {
                float out[STRIP] = {};
                kernels.dense_floats(down, s, from, down.columns, 1, out);
                std::memcpy(to + s * STRIP, out, size_t(std::min(STRIP, down.rows - s * STRIP)) * sizeof(float));
            }
        }
    }
}

namespace {

using Form = Input::Form;

const Form &mapped(const Input &input, const Linear &l) {
    Cut whole;
    whole.columns = l.columns;
    return input.find(Form::mapped, whole, l.map.get());
}

const Form &inner(const Input &input, const Linear &l) {
    Cut whole;
    whole.columns = l.down->rows;
    return input.find(Form::inner, whole, l.map.get(), &l);
}

void add_sparse(const Linear &l, const Input &input, int strip, int lanes, float *out, int stride) {
    const Form &x = mapped(input, l);
    thread_local std::vector<float> weights;
    thread_local std::vector<int32_t> columns;
    for (int lane = 0; lane < lanes; ++lane) {
        const int64_t from = l.sparse->starts[strip * STRIP + lane], to = l.sparse->starts[strip * STRIP + lane + 1];
        const size_t count = size_t(to - from);
        weights.resize(count), columns.resize(count);
        for (size_t i = 0; i < count; ++i) weights[i] = l.sparse->value(from + int64_t(i)), columns[i] = l.sparse->column(from + int64_t(i));
        for (int row = 0; row < input.rows(); ++row) {
            const float *values = x.values.data() + size_t(row) * x.width;
            float total = 0;
            for (size_t i = 0; i < count; ++i) total += weights[i] * values[columns[i]];
            out[size_t(row) * stride + lane] += total;
        }
    }
}

void begin(const Linear &l, int strip, int rows, float *out, int stride) {
    for (int row = 0; row < rows; ++row) {
        if (l.bias.size() && !l.out_map) std::memcpy(out + size_t(row) * stride, l.bias.data() + strip * STRIP, STRIP * sizeof(float));
        else std::memset(out + size_t(row) * stride, 0, STRIP * sizeof(float));
    }
}

void finish(const Kernels &k, const Product &p, int strip, int rows, const float *out, int stride) {
    const int lanes = std::min(STRIP, p.linear->rows - strip * STRIP);
    k.put_rows(out, stride, rows, lanes, p.out + strip * STRIP, p.stride);
}

// One strip, few rows.
void direct(const Kernels &k, const Product &p, int strip, const Input &input) {
    const Linear &l = *p.linear;
    alignas(64) float out[MOST_ROWS * STRIP];
    const int rows = input.rows();
    begin(l, strip, rows, out, STRIP);
    for (const Coded &m : l.coded) {
        if (input.bytes() && m.reads_bytes()) {
            k.coded_bytes(m, strip, input.find(Form::direct, m.cut, l.map.get()).quantized, 0, rows, out);
        } else {
            const Form &x = input.find(Form::floats, m.cut, l.map.get());
            k.coded_floats(m, strip, x.values.data(), x.width, rows, out);
        }
    }
    for (const Dense &m : l.dense) k.dense_floats(m, strip, mapped(input, l).values.data(), l.columns, rows, out);
    if (l.up) k.dense_floats(*l.up, strip, inner(input, l).values.data(), l.up->columns, rows, out);
    if (l.sparse) add_sparse(l, input, strip, std::min(STRIP, l.rows - strip * STRIP), out, STRIP);
    finish(k, p, strip, rows, out, STRIP);
}

void panel_of(const Kernels &k, const Dense &m, int strip, const float *x, int rows, float *out, int stride, Scratch &scratch) {
    scratch.panel.resize(size_t(m.columns) * STRIP);
    k.decode_dense(m, strip, scratch.panel.data());
    k.panel_floats(scratch.panel.data(), m.columns, x, m.columns, rows, out, stride);
}

// One of the two strips that share a tile product; no linear where there is only one.
struct Half {
    const Linear *linear;
    int strip;
};

// Whether a tile product is all that a whole strip takes.
bool is_single(const Half &h) {
    const Linear &l = *h.linear;
    return l.coded.size() + l.dense.size() == 1 && !l.down && !l.sparse && (h.strip + 1) * STRIP <= l.rows;
}

// Two strips, many rows: scratch.out[row][32]. The sums of whole strips that take a single product are put where they belong at
// once; says whether that was done.
bool tiled(const Kernels &k, const Half (&halves)[2], const Input &input, Scratch &scratch, const Put &put) {
    const int rows = input.rows(), padded = (rows + 31) / 32 * 32;
    scratch.out.resize(size_t(padded) * 2 * STRIP);
    float *out = scratch.out.data();
    for (int i = 0; i < 2; ++i) {
        if (halves[i].linear != nullptr) begin(*halves[i].linear, halves[i].strip, rows, out + i * STRIP, 2 * STRIP);
    }
    const auto form = [&](const Half &h) -> const void * {
        const Linear &l = *h.linear;
        return &input.find(Input::many(k), l.coded.empty() ? flat_cut(l.columns) : l.coded[0].cut, l.map.get());
    };
    const bool done = put.mode != Put::stay && halves[1].linear != nullptr && is_single(halves[0]) && is_single(halves[1]) &&
                      form(halves[0]) == form(halves[1]);
    // The n-th terms of both together where they read the same form of x; alone, beside a strip of scale 0, otherwise.
    auto with_tiles = [&](auto form_of, auto small, auto fill, auto fill_halves) {
        const Form *forms[2] = {halves[0].linear ? form_of(*halves[0].linear) : nullptr,
                                 halves[1].linear ? form_of(*halves[1].linear) : nullptr};
        auto run = [&](const Form &form, bool with_first, bool with_second) {
            if (form.kind == Form::halved) {
                const size_t strip = size_t(form.halves.column_tiles()) * 512;
                scratch.halves.resize(2 * strip);
                for (int i = 0; i < 2; ++i) {
                    uint16_t *to = scratch.halves.data() + i * strip;
                    if (i == 0 ? with_first : with_second) fill_halves(*halves[i].linear, halves[i].strip, to);
                    else std::memset(to, 0, strip * sizeof(uint16_t));
                }
                return k.half_product(form.halves, scratch.halves.data(), out, done ? put : Put{});
            }
            const Tiled &x = form.tiles;
            const size_t step = size_t(x.cut.tiles_per_segment()) * 1024;
            scratch.tiles.resize(step * 2 * x.cut.segments());
            scratch.scales.resize(size_t(2 * STRIP) * x.cut.segments());
            scratch.known.resize(size_t(x.cut.tiles()) * 64);
            scratch.single.resize(size_t(x.cut.tiles()) * 64 * 2 * STRIP);
            for (int s = 0; s < x.cut.segments(); ++s) {
                for (int i = 0; i < 2; ++i) {
                    float *scales = scratch.scales.data() + (2 * s + i) * STRIP;
                    int8_t *tiles = scratch.tiles.data() + (2 * size_t(s) + i) * step;
                    if (i == 0 ? with_first : with_second) fill(*halves[i].linear, halves[i].strip, s, tiles, scales);
                    else std::memset(scales, 0, STRIP * sizeof(float));
                }
            }
            const bool all_small = (!with_first || small(*halves[0].linear)) && (!with_second || small(*halves[1].linear));
            const Tiles tiles{scratch.tiles.data(), scratch.scales.data(), all_small, scratch.single.data(), scratch.known.data()};
            k.tile_product(x, tiles, out, done ? put : Put{});
        };
        if (forms[0] != nullptr && forms[0] == forms[1]) return run(*forms[0], true, true);
        if (forms[0] != nullptr) run(*forms[0], true, false);
        if (forms[1] != nullptr) run(*forms[1], false, true);
    };
    size_t coded = 0, dense = 0;
    for (const Half &h : halves) {
        if (h.linear == nullptr) continue;
        coded = std::max(coded, h.linear->coded.size()), dense = std::max(dense, h.linear->dense.size());
    }
    for (size_t t = 0; t < coded; ++t) {
        with_tiles(
            [&](const Linear &l) -> const Form * {
                return t < l.coded.size() ? &input.find(Input::many(k), l.coded[t].cut, l.map.get()) : nullptr;
            },
            [&](const Linear &l) { return l.coded[t].small(); },
            [&](const Linear &l, int strip, int s, int8_t *tiles, float *scales) {
                k.fill_tiles(l.coded[t], strip, s, tiles, scales);
            },
            [&](const Linear &l, int strip, uint16_t *to) { k.fill_halves(l.coded[t], strip, to); });
    }
    for (size_t t = 0; t < dense; ++t) {
        with_tiles(
            [&](const Linear &l) -> const Form * {
                return t < l.dense.size() ? &input.find(Input::many(k), flat_cut(l.columns), l.map.get()) : nullptr;
            },
            [&](const Linear &) { return false; },
            [&](const Linear &l, int strip, int s, int8_t *tiles, float *scales) {
                k.fill_tiles_dense(l.dense[t], flat_cut(l.columns), strip, s, tiles, scales);
            },
            [&](const Linear &l, int strip, uint16_t *to) { k.fill_halves_dense(l.dense[t], strip, to); });
    }
    for (int i = 0; i < 2; ++i) {
        if (halves[i].linear == nullptr) continue;
        const Linear &l = *halves[i].linear;
        const int strip = halves[i].strip;
        float *here = out + i * STRIP;
        if (l.up) panel_of(k, *l.up, strip, inner(input, l).values.data(), rows, here, 2 * STRIP, scratch);
        if (l.sparse) add_sparse(l, input, strip, std::min(STRIP, l.rows - strip * STRIP), here, 2 * STRIP);
    }
    return done;
}

void tiled_pair(const Kernels &k, const Product &p, int pair, const Input &input, Scratch &scratch) {
    const int first = pair * 2;
    const bool two = first + 1 < p.linear->strips();
    const Put put{Put::both, p.out + first * STRIP, p.out + (first + 1) * STRIP, p.stride};
    if (tiled(k, {{p.linear, first}, {two ? p.linear : nullptr, first + 1}}, input, scratch, put)) return;
    finish(k, p, first, input.rows(), scratch.out.data(), 2 * STRIP);
    if (two) finish(k, p, first + 1, input.rows(), scratch.out.data() + STRIP, 2 * STRIP);
}

// One strip, many rows, in float.
void paneled(const Kernels &k, const Product &p, int strip, const Input &input, Scratch &scratch) {
    const Linear &l = *p.linear;
    const int rows = input.rows();
    scratch.out.resize(size_t(rows) * STRIP);
    float *out = scratch.out.data();
    begin(l, strip, rows, out, STRIP);
    for (const Coded &m : l.coded) {
        scratch.panel.resize(size_t(m.cut.padded()) * STRIP);
        k.decode_coded(m, strip, scratch.panel.data());
        const Form &x = input.find(Form::floats, m.cut, l.map.get());
        k.panel_floats(scratch.panel.data(), x.width, x.values.data(), x.width, rows, out, STRIP);
    }
    for (const Dense &m : l.dense) panel_of(k, m, strip, mapped(input, l).values.data(), rows, out, STRIP, scratch);
    if (l.up) panel_of(k, *l.up, strip, inner(input, l).values.data(), rows, out, STRIP, scratch);
    if (l.sparse) add_sparse(l, input, strip, std::min(STRIP, l.rows - strip * STRIP), out, STRIP);
    finish(k, p, strip, rows, out, STRIP);
}

}  // namespace

void multiply_gated(const Kernels &kernels, Pool &pool, int thread, const Gated &p, const Input &input, Scratch &scratch) {
    const int strips = p.gate->strips(), piece = std::max(1, std::min(4, strips / (pool.threads() * 4)));
    for (int at = pool.first_piece(thread, strips, piece); at < strips; at = pool.next_piece(strips, piece)) {
        for (int strip = at; strip < std::min(strips, at + piece); ++strip) {
            const Put put{p.tanh_gelu ? Put::gelu : Put::silu, p.out + strip * STRIP, nullptr, p.stride};
            if (tiled(kernels, {{p.gate, strip}, {p.up, strip}}, input, scratch, put)) continue;
            kernels.put_gated(scratch.out.data(), input.rows(), std::min(STRIP, p.gate->rows - strip * STRIP), p.tanh_gelu,
                              p.out + strip * STRIP, p.stride);
        }
    }
}

namespace {

// Pieces long enough to read memory in order, short enough that no thread waits long for another.
int piece_size(int items, int threads, bool few) { return std::max(1, std::min(few ? 32 : 4, items / (threads * 4))); }

}  // namespace

void multiply(const Kernels &kernels, Pool &pool, int thread, const std::vector<Product> &products, const Input &input,
              Scratch &scratch) {
    const bool few = input.rows() <= MOST_ROWS, pairs = !few && input.bytes();
    const auto items = [&](const Product &p) { return pairs ? (p.linear->strips() + 1) / 2 : p.linear->strips(); };
    int total = 0;
    for (const Product &p : products) total += items(p);
    const int piece = piece_size(total, pool.threads(), few);
    for (int at = pool.first_piece(thread, total, piece); at < total; at = pool.next_piece(total, piece)) {
        for (int item = at; item < std::min(total, at + piece); ++item) {
            int index = item;
            for (const Product &p : products) {
                if (index < items(p)) {
                    if (few) direct(kernels, p, index, input);
                    else if (pairs) tiled_pair(kernels, p, index, input, scratch);
                    else paneled(kernels, p, index, input, scratch);
                    break;
                }
                index -= items(p);
            }
        }
    }
}

void map_outputs(Pool &pool, int thread, const std::vector<Product> &products, int rows) {
    thread_local std::vector<float> row_before;
    bool any = false;
    for (const Product &p : products) {
        const Linear &l = *p.linear;
        if (l.out_map == nullptr) continue;
        any = true;
        row_before.resize(size_t(l.rows));
        for (int row = thread; row < rows; row += pool.threads()) {
            float *out = p.out + size_t(row) * p.stride;
            std::copy(out, out + l.rows, row_before.data());
            l.out_map->apply(row_before.data(), out);
            for (int i = 0; i < l.rows && l.bias.size(); ++i) out[i] += l.bias[size_t(i)];
        }
    }
    if (any) pool.wait();
}

}  // namespace bitpress
