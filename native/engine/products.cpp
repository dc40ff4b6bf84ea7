#include "products.h"

#include <algorithm>
#include <cstring>

namespace bitpress {

namespace {

using Form = Input::Form;
using Key = Input::Key;

const Form &form_of(const Input &input, Key::Kind kind, const Linear &l, const Coded &m) { return input.find(key_of(kind, l, m)); }

const Form &mapped(const Input &input, const Linear &l) {
    Cut whole;
    whole.columns = l.columns;
    return input.find({Key::mapped, whole, l.map.get(), nullptr, nullptr, l.rounding});
}

const Form &inner(const Input &input, const Linear &l) {
    Cut whole;
    whole.columns = l.down.rows();
    return input.find({Key::inner, whole, l.map.get(), &l, nullptr, l.rounding});
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
        if (m.whole_sums) {
            k.integers_few(m, strip, form_of(input, Key::integers, l, m).whole, out);
        } else if (input.bytes() && m.reads_bytes() && !l.rounding) {
            k.coded_bytes(m, strip, form_of(input, Key::direct, l, m).quantized, 0, rows, out);
        } else {
            const Form &x = form_of(input, Key::floats, l, m);
            k.coded_floats(m, strip, x.values.data(), x.width, rows, out);
        }
    }
    for (const Dense &m : l.dense) k.dense_floats(m, strip, mapped(input, l).values.data(), l.columns, rows, out);
    if (l.up.any()) add_factor(k, l.up, strip, inner(input, l).values.data(), rows, out);
    if (l.sparse) add_sparse(l, input, strip, std::min(STRIP, l.rows - strip * STRIP), out, STRIP);
    finish(k, p, strip, rows, out, STRIP);
}

void panel_of(const Kernels &k, const Dense &m, int strip, const float *x, int rows, float *out, int stride, Scratch &scratch) {
    scratch.panel.resize(size_t(m.columns) * STRIP);
    k.decode_dense(m, strip, scratch.panel.data());
    k.panel_floats(scratch.panel.data(), m.columns, x, m.columns, rows, out, stride);
}

void panel_of_up(const Kernels &k, const Linear &l, int strip, const Input &input, float *out, int stride, Scratch &scratch) {
    const Form &x = inner(input, l);
    if (l.up.dense) return panel_of(k, *l.up.dense, strip, x.values.data(), input.rows(), out, stride, scratch);
    scratch.panel.resize(size_t(l.up.width()) * STRIP);
    k.decode_coded(*l.up.coded, strip, scratch.panel.data());
    k.panel_floats(scratch.panel.data(), x.width, x.values.data(), x.width, input.rows(), out, stride);
}

// The codes and the uncompressed weights of one strip times many rows that the model's own rounding has made whole numbers.
void add_rounded(const Kernels &k, const Linear &l, int strip, const Input &input, float *out, int stride, Scratch &scratch) {
    for (const Coded &m : l.coded) {
        const Form &x = form_of(input, Key::floats, l, m);
        if (m.whole_sums) {
            scratch.tiles.resize(size_t(m.cut.groups) * m.cut.tiled_group() * STRIP * x.whole.bytes);
            k.unpack_integers(m, strip, x.whole.bytes, scratch.tiles.data());
            k.integers_many(m, strip, x.whole, scratch.tiles.data(), out, stride);
            continue;
        }
        scratch.panel.resize(size_t(m.cut.padded()) * STRIP);
        k.decode_coded(m, strip, scratch.panel.data());
        k.panel_floats(scratch.panel.data(), x.width, x.values.data(), x.width, input.rows(), out, stride);
    }
    for (const Dense &m : l.dense) panel_of(k, m, strip, mapped(input, l).values.data(), input.rows(), out, stride, scratch);
}

// One of the two strips that share a tile product; no linear where there is only one.
struct Half {
    const Linear *linear;
    int strip;
};

// Whether a tile product is all that a whole strip takes.
bool is_single(const Half &h) {
    const Linear &l = *h.linear;
    return l.coded.size() + l.dense.size() == 1 && !l.rounding && !l.down.any() && !l.sparse && (h.strip + 1) * STRIP <= l.rows;
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
        if (!l.coded.empty()) return &form_of(input, Input::many(k), l, l.coded[0]);
        return &input.find({Input::many(k), flat_cut(l.columns), l.map.get()});
    };
    const bool done = put.mode != Put::stay && halves[1].linear != nullptr && is_single(halves[0]) && is_single(halves[1]) &&
                      form(halves[0]) == form(halves[1]);
    // The n-th terms of both together where they read the same form of x; alone, beside a strip of scale 0, otherwise.
    auto with_tiles = [&](auto form_of, auto small, auto fill, auto fill_halves) {
        const Form *forms[2] = {halves[0].linear ? form_of(*halves[0].linear) : nullptr,
                                 halves[1].linear ? form_of(*halves[1].linear) : nullptr};
        auto run = [&](const Form &form, bool with_first, bool with_second) {
            if (form.kind == Key::halved) {
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
                return t < l.coded.size() && !l.rounding ? &form_of(input, Input::many(k), l, l.coded[t]) : nullptr;
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
                return t < l.dense.size() && !l.rounding ? &input.find({Input::many(k), flat_cut(l.columns), l.map.get()}) : nullptr;
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
        if (l.rounding) add_rounded(k, l, strip, input, here, 2 * STRIP, scratch);
        if (l.up.any()) panel_of_up(k, l, strip, input, here, 2 * STRIP, scratch);
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
        const Form &x = form_of(input, Key::floats, l, m);
        k.panel_floats(scratch.panel.data(), x.width, x.values.data(), x.width, rows, out, STRIP);
    }
    for (const Dense &m : l.dense) panel_of(k, m, strip, mapped(input, l).values.data(), rows, out, STRIP, scratch);
    if (l.up.any()) panel_of_up(k, l, strip, input, out, STRIP, scratch);
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
    const bool few = input.rows() <= MOST_ROWS;
    const auto pairs = [&](const Product &p) { return !few && (input.bytes() || p.linear->rounding); };
    const auto items = [&](const Product &p) { return pairs(p) ? (p.linear->strips() + 1) / 2 : p.linear->strips(); };
    int total = 0;
    for (const Product &p : products) total += items(p);
    const int piece = piece_size(total, pool.threads(), few);
    for (int at = pool.first_piece(thread, total, piece); at < total; at = pool.next_piece(total, piece)) {
        for (int item = at; item < std::min(total, at + piece); ++item) {
            int index = item;
            for (const Product &p : products) {
                if (index < items(p)) {
                    if (few) direct(kernels, p, index, input);
                    else if (pairs(p)) tiled_pair(kernels, p, index, input, scratch);
                    else paneled(kernels, p, index, input, scratch);
                    break;
                }
                index -= items(p);
            }
        }
    }
}

void map_outputs(const Kernels &kernels, Pool &pool, int thread, const std::vector<Product> &products, int rows) {
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
            l.out_map->apply(kernels, row_before.data(), out);
            for (int i = 0; i < l.rows && l.bias.size(); ++i) out[i] += l.bias[size_t(i)];
        }
    }
    if (any) pool.wait();
}

}  // namespace bitpress
