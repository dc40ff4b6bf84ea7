// Linear layers as plain arrays and back, so that a layout can be written to a file and mapped from it: nothing is laid out twice.
//
// Coming back, the large arrays (codes and sixteen-bit weights) are used where they lie, which Python keeps alive; the rest is copied.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "arguments.h"
#include "bindings.h"
#include "codes_given.h"
#include "matrix.h"

namespace nb = nanobind;

namespace bitpress {

namespace {

template <typename T> nb::object as_array(const T *data, size_t count, nb::handle owner) {
    return nb::cast(nb::ndarray<nb::numpy, const T, nb::ndim<1>>(data, {count}, owner));
}

template <typename T> void copy_array(const Part &from, const char *key, size_t count, Aligned<T> &to) {
    const auto given = from.array<T>(key, count);
    to.resize(count);
    if (count) std::memcpy(to.data(), given.data(), count * sizeof(T));
}

// Uses an array where it lies; `kept` keeps it.
template <typename T> void borrow_array(const Part &from, const char *key, size_t count, Aligned<T> &to, nb::list &kept) {
    const auto given = from.array<T>(key, count);
    to.borrow(given.data(), count);
    kept.append(from.at(key));
}

// ---- to arrays ----

nb::dict give_per_block(const PerBlock &p, nb::handle owner) {
    nb::dict d;
    d["bits"] = p.bits, d["values"] = as_array(p.values.data(), p.values.size(), owner);
    return d;
}

nb::dict give_scales(const Scales &s, nb::handle owner) {
    nb::dict d;
    d["kind"] = int(s.kind), d["tall"] = s.each.tall, d["values"] = as_array(s.each.values.data(), s.each.values.size(), owner);
    if (s.rows.size()) d["rows"] = as_array(s.rows.data(), s.rows.size(), owner);
    if (s.shared.size()) d["shared"] = as_array(s.shared.data(), s.shared.size(), owner), d["offset"] = s.offset, d["planes"] = s.planes, d["plane"] = s.plane;
    if (s.has_runs()) {
        d["factors"] = as_array(s.factors.values.data(), s.factors.values.size(), owner);
        d["run_bits"] = s.run_bits, d["offset"] = s.offset, d["planes"] = s.planes, d["plane"] = s.plane;
    }
    return d;
}

nb::dict give_coded(const Coded &m, nb::handle owner) {
    nb::dict d;
    d["rows"] = m.rows, d["kind"] = int(m.kind), d["bits"] = m.bits, d["span"] = m.span, d["group"] = m.group, d["zero"] = m.zero, d["gain"] = m.gain, d["step"] = m.step;
    d["packing"] = int(m.packing), d["is_picked"] = m.picked.size() != 0;
    if (m.picked.size()) d["picked"] = as_array(m.picked.data(), m.picked.size(), owner);
    if (m.kind == CodeKind::pyramid) d["pulses"] = m.pulses;
    d["scales"] = give_scales(m.scales, owner);
    d["lines"] = as_array(m.lines.data(), m.lines.size(), owner);
    d["has_zeros"] = m.zeros.any(), d["has_which"] = m.which.any(), d["is_half"] = m.halves.size() != 0;
    d["has_less"] = m.less.any();
    if (m.less.any()) d["less"] = give_scales(m.less.scales, owner), d["less_gain"] = m.less.gain, d["less_of_codes"] = m.less.of_codes;
    if (m.zeros.any()) d["zeros"] = give_per_block(m.zeros, owner);
    if (m.which.any()) d["which"] = give_per_block(m.which, owner);
    if (m.kind == CodeKind::table) d["table"] = as_array(m.table, m.levels.size(), owner);
    if (m.levels.size()) d["levels"] = as_array(m.levels.data(), m.levels.size(), owner);
    if (m.own.size()) d["own"] = as_array(m.own.data(), m.own.size(), owner);
    if (m.kind == CodeKind::words) d["books"] = m.books, d["word_bits"] = m.word_bits;
    if (m.words.size()) d["words"] = as_array(m.words.data(), m.words.size(), owner);
    if (m.halves.size()) d["halves"] = as_array(m.halves.data(), m.halves.size(), owner);
    if (m.kind == CodeKind::trellis) {
        Aligned<int32_t> path(Path::COUNT);
        m.path.give(path.data());
        d["path"] = nb::cast(nb::ndarray<nb::numpy, const int32_t, nb::ndim<1>>(path.data(), {Path::COUNT}), nb::rv_policy::copy);
    }
    d["whole_sums"] = m.whole_sums;
    if (m.has_code_sums) d["code_sums"] = as_array(m.code_sums.data(), m.code_sums.size(), owner);
    if (m.points.size()) d["points"] = as_array(m.points.data(), m.points.size(), owner);
    return d;
}

nb::dict give_dense(const Dense &m, nb::handle owner) {
    nb::dict d;
    d["rows"] = m.rows, d["columns"] = m.columns, d["half"] = m.half, d["has_gain"] = m.gain.size() != 0;
    d["values"] = as_array(m.values.data(), m.values.size(), owner);
    if (m.gain.size()) d["gain"] = as_array(m.gain.data(), m.gain.size(), owner);
    return d;
}

nb::list give_map(const InputMap &map, nb::handle owner) {
    nb::list steps;
    for (const MapStep &step : map.steps()) {
        nb::dict d;
        if (step.kind == MapStep::gather) {
            d["kind"] = "gather", d["order"] = as_array(step.order.data(), step.order.size(), owner);
        } else if (step.kind == MapStep::scale) {
            d["kind"] = "scale", d["values"] = as_array(step.values.data(), step.values.size(), owner);
        } else {
            d["kind"] = "mix", d["block"] = step.block, d["across"] = step.across;
            if (!step.left.empty()) d["left"] = as_array(step.left.data(), step.left.size(), owner);
            if (!step.right.empty()) d["right"] = as_array(step.right.data(), step.right.size(), owner);
        }
        steps.append(d);
    }
    return steps;
}

nb::dict give_range(const CodeRange &r) {
    nb::dict d;
    d["bits"] = r.bits, d["has_zero"] = r.has_zero, d["group"] = r.group;
    d["kind"] = r.kind == ScaleKind::f32 ? "fp32" : r.kind == ScaleKind::f16 ? "fp16" : "bf16";
    return d;
}

nb::dict give_rounding(const Rounding &r) {
    nb::dict d = give_range(r);
    if (r.first > 0) {
        nb::dict leading = give_range(r.leading);
        leading["columns"] = r.first;
        d["first"] = leading;
    }
    if (r.fixed) d["scale"] = r.scale, d["zero"] = r.zero;
    return d;
}

// What arrays of a layer's memory hold on to: the layer, which stays as it is while there are any.
struct Owner {
    nb::object linear;
    Use use;
};

nb::dict give(nb::handle linear) {
    const auto *given = taken<const Linear *>(linear, "linear", "a Linear");
    if (given == nullptr) throw nb::type_error("linear must be a Linear");
    const Linear &l = *given;
    const nb::capsule self(new Owner{nb::borrow(linear), Use(l)}, [](void *p) noexcept { delete static_cast<Owner *>(p); });
    nb::dict d;
    d["rows"] = l.rows, d["columns"] = l.columns;
    nb::list coded, dense;
    for (const Coded &m : l.coded) coded.append(give_coded(m, self));
    for (const Dense &m : l.dense) dense.append(give_dense(m, self));
    d["coded"] = coded, d["dense"] = dense;
    const auto give_factor = [&](const Factor &f) { return f.coded ? give_coded(*f.coded, self) : give_dense(*f.dense, self); };
    if (l.down.any()) d["down"] = give_factor(l.down), d["up"] = give_factor(l.up);
    if (l.sparse != nullptr) {
        nb::dict s;
        s["starts"] = as_array(l.sparse->starts.data(), l.sparse->starts.size(), self);
        s["is_narrow"] = l.sparse->wide.empty(), s["is_half"] = l.sparse->floats.empty();
        if (l.sparse->wide.empty()) s["columns"] = as_array(l.sparse->narrow.data(), l.sparse->narrow.size(), self);
        else s["columns"] = as_array(l.sparse->wide.data(), l.sparse->wide.size(), self);
        if (l.sparse->floats.empty()) s["values"] = as_array(l.sparse->halves.data(), l.sparse->halves.size(), self);
        else s["values"] = as_array(l.sparse->floats.data(), l.sparse->floats.size(), self);
        d["sparse"] = s;
    }
    if (l.bias.size()) d["bias"] = as_array(l.bias.data(), l.bias.size(), self);
    if (l.rounding) d["rounding"] = give_rounding(*l.rounding);
    if (l.map) d["map"] = give_map(*l.map, self);
    if (l.out_map) d["out_map"] = give_map(*l.out_map, self);
    return d;
}

// ---- from arrays ----

void take_per_block(const Part &part, const PerBlock &like, int most_bits, PerBlock &to) {
    to.rows = like.rows, to.groups = like.groups, to.tall = like.tall;
    to.bits = part.whole("bits", 1, most_bits);
    need(to.bits == bits_that_hold(to.bits), "bits must be 1, 2, 4 or 8");
    copy_array(part, "values", to.size(), to.values);
}

void take_scales(const Part &part, int rows, int groups, Scales &s) {
    s.kind = ScaleKind(part.whole("kind", 0, SCALE_KINDS - 1));
    s.each.bits = scale_bits(s.kind), s.each.rows = rows, s.each.groups = groups;
    s.each.tall = part.whole("tall", 1, rows);
    need(rows % s.each.tall == 0, "tall must divide the rows");
    copy_array(part, "values", s.each.size(), s.each.values);
    if (s.has_rows()) copy_array(part, "rows", s.row_count(), s.rows);
    if (s.kind != ScaleKind::dq && !s.has_runs()) return;
    s.planes = part.whole("planes", 1, 4), s.plane = part.whole("plane", 0, s.planes - 1), s.offset = part.number("offset");
    if (s.kind == ScaleKind::dq) return copy_array(part, "shared", s.shared_count(), s.shared);
    s.run_bits = part.whole("run_bits", 0, 8);
    s.shape_factors();
    copy_array(part, "factors", s.factors.size(), s.factors.values);
}

bool all_finite(const Aligned<float> &values) {
    return std::all_of(values.data(), values.data() + values.size(), [](float v) { return std::isfinite(v); });
}

void take_kind(const Part &part, Coded &m) {
    const PerBlock &each = m.scales.each;
    if (m.kind <= CodeKind::halves) need(m.bits <= 8 && m.span == 1, "codes of single weights have at most 8 bits");
    const bool has_zeros = part.claim("has_zeros"), has_which = part.claim("has_which"), is_half = part.claim("is_half");
    const bool is_pair = m.kind == CodeKind::pairs;
    need(!has_which || m.kind == CodeKind::levels || is_pair, "only levels and pairs have tables to choose among");
    need(!is_half || m.kind == CodeKind::words, "only words are in fp16");
    if (has_zeros) {
        need(m.kind == CodeKind::whole || m.kind == CodeKind::halves, "only whole and half numbers have zero points");
        take_per_block({part.path("zeros"), part.at("zeros")}, each, 8, m.zeros);
        for (int r = 0; r < each.rows; r += each.tall) {
            for (int g = 0; g < each.groups; ++g) need(m.zeros.code(r, g) >> m.bits == 0, "a zero point is too large for the bits of the codes");
        }
    }
    if (m.kind == CodeKind::table) {
        const size_t entries = std::max<size_t>(16, m.level_count());
        need(m.zero == 128, "the bytes of a table are for a zero of 128");
        std::memcpy(m.table, part.array<uint8_t>("table", entries).data(), entries);
        copy_array(part, "levels", entries, m.levels);
    } else if (m.kind == CodeKind::levels || is_pair) {
        need(!is_pair || (m.bits <= 8 && m.span == 1 && m.group % 2 == 0), "groups of pairs have whole pairs of columns");
        int bits = is_pair ? 1 : 0;
        if (has_which) {
            take_per_block({part.path("which"), part.at("which")}, each, 8, m.which);
            bits += m.which.bits;
        }
        // As many tables as blocks can name.
        copy_array(part, "levels", m.level_count() << bits, m.levels);
    } else if (m.kind == CodeKind::own) {
        copy_array(part, "own", own_count(m), m.own);
    } else if (m.kind == CodeKind::words) {
        m.books = part.whole("books", 1, 16), m.word_bits = part.whole("word_bits", 1, 16 / m.books);
        if (is_half) copy_array(part, "halves", word_count(m), m.halves);
        else copy_array(part, "words", word_count(m), m.words);
    } else if (m.kind == CodeKind::e8p) {
        need(m.bits == 16 && m.span == 8, "codes of e8p have 16 bits for 8 columns");
        copy_array(part, "points", 256 * 8, m.points);
    } else if (m.kind == CodeKind::trellis) {
        need(m.bits <= 8 && m.span == 1, "codes of single weights have at most 8 bits");
        m.path.take(part.array<int32_t>("path", Path::COUNT).data());
    } else if (m.kind == CodeKind::pyramid) {
        m.pulses = part.whole("pulses", 1, 32);
    }
    if (part.claim("has_less")) {
        take_scales({part.path("less"), part.at("less")}, each.rows, each.groups, m.less.scales);
        need(m.less.scales.each.tall == each.tall, "what is taken away must be for the blocks of the scales");
        m.less.gain = part.number("less_gain"), m.less.of_codes = part.claim("less_of_codes");
    }
    check_packing(m);
    need(all_finite(m.levels) && all_finite(m.words), "levels must be finite");
}

Coded take_coded(const Part &part, int rows, int all_columns, const std::optional<Rounding> &rounding, nb::list &kept) {
    Coded m;
    if (part.claim("is_picked")) take_picked(m, taken<Array<const int32_t, 1>>(part.at("picked"), part.path("picked"), "whole numbers", false), all_columns);
    const int columns = m.picked.size() ? int(m.picked.size()) : all_columns;
    m.rows = part.whole("rows", rows, rows);
    m.packing = Packing(part.whole("packing", 0, PACKINGS - 1));
    m.kind = CodeKind(part.whole("kind", 0, CODE_KINDS - 1));
    m.bits = part.whole("bits", 1, 24);
    m.span = part.whole("span", 1, std::min(32, columns));
    need(stored_bits(m.bits, m.span) == m.bits, "codes of so many bits for so many columns have no layout");
    m.zero = part.whole("zero", 0, 255);
    m.gain = part.number("gain"), m.step = part.number("step");
    m.group = part.whole("group", 1, columns);
    take_scales({part.path("scales"), part.at("scales")}, rows, (columns + m.group - 1) / m.group, m.scales);
    take_kind(part, m);
    if (rounding) sum_whole(m, *rounding);
    need(part.claim("whole_sums") == m.whole_sums, "sums of whole numbers are for a layer whose input is rounded");
    set_cut(m, columns);
    if (m.has_code_sums) copy_array(part, "code_sums", size_t(m.strips()) * m.cut.groups * STRIP, m.code_sums);
    borrow_array(part, "lines", size_t(m.strips()) * m.cut.blocks() * m.block_bytes(), m.lines, kept);
    m.find_reach();
    m.find_near();
    m.count_points();
    return m;
}

Dense take_dense(const Part &part, int rows, int columns, nb::list &kept) {
    Dense m;
    m.rows = part.whole("rows", rows, rows), m.columns = part.whole("columns", columns, columns);
    m.half = part.claim("half");
    borrow_array(part, "values", size_t(m.strips()) * columns * STRIP, m.values, kept);
    if (part.claim("has_gain")) copy_array(part, "gain", size_t(m.strips()) * STRIP, m.gain);
    return m;
}

Factor take_factor(const Part &part, int rows, int columns, nb::list &kept) {
    if (part.has("lines")) return {nullptr, std::make_unique<Coded>(take_coded(part, rows, columns, std::nullopt, kept))};
    return {std::make_unique<Dense>(take_dense(part, rows, columns, kept)), nullptr};
}

std::unique_ptr<Sparse> take_sparse(const Part &part, int rows, int columns) {
    const auto starts = part.array<int64_t>("starts", size_t(rows) + 1);
    auto sparse = std::make_unique<Sparse>();
    sparse->starts.assign(starts.data(), starts.data() + rows + 1);
    const int64_t count = sparse->starts.back();
    need(sparse->starts.front() == 0 && count <= int64_t(rows) * columns, "starts must go from 0 to the number of values");
    need(std::is_sorted(sparse->starts.begin(), sparse->starts.end()), "starts must not fall");
    const auto take = [&]<typename T>(const char *key, std::vector<T> &to) {
        const auto given = part.array<T>(key, size_t(count));
        to.assign(given.data(), given.data() + count);
    };
    if (part.claim("is_narrow")) take("columns", sparse->narrow);
    else take("columns", sparse->wide);
    if (part.claim("is_half")) take("values", sparse->halves);
    else take("values", sparse->floats);
    for (int64_t i = 0; i < count; ++i) need(sparse->column(i) >= 0 && sparse->column(i) < columns, "a column is out of range");
    return sparse;
}

template <class F> void each_part(const Part &part, const char *key, F take) {
    int index = 0;
    for (nb::handle given : taken<nb::list>(part.at(key), part.path(key), "a list")) {
        take(Part(part.path(key) + "[" + std::to_string(index++) + "]", given));
    }
}

Linear *take(nb::handle stored) {
    const Part part("stored", stored);
    nb::list kept;
    auto l = std::make_unique<Linear>();
    l->rows = part.whole("rows", 1), l->columns = part.whole("columns", 1);
    if (part.has("rounding")) l->rounding = take_rounding({part.path("rounding"), part.at("rounding")}, l->columns);
    each_part(part, "coded", [&](const Part &given) { l->coded.push_back(take_coded(given, l->rows, l->columns, l->rounding, kept)); });
    each_part(part, "dense", [&](const Part &given) { l->dense.push_back(take_dense(given, l->rows, l->columns, kept)); });
    if (part.has("down")) {
        const Part down(part.path("down"), part.at("down")), up(part.path("up"), part.at("up"));
        const int rank = down.whole("rows", 1);
        l->down = take_factor(down, rank, l->columns, kept);
        l->up = take_factor(up, l->rows, rank, kept);
    }
    if (part.has("sparse")) l->sparse = take_sparse({part.path("sparse"), part.at("sparse")}, l->rows, l->columns);
    if (part.has("bias")) copy_array(part, "bias", size_t(l->strips()) * STRIP, l->bias);
    if (part.has("map")) l->map = InputMap::of(l->columns, take_map(part.at("map"), "stored.map", l->columns));
    if (part.has("out_map")) l->out_map = InputMap::of(l->rows, take_map(part.at("out_map"), "stored.out_map", l->rows));
    l->owner = std::shared_ptr<void>(kept.release().ptr(), [](void *list) {
        const nb::gil_scoped_acquire held;
        nb::handle(static_cast<PyObject *>(list)).dec_ref();
    });
    return l.release();
}

}  // namespace

std::vector<MapStep> take_map(nb::handle given, const char *name, int columns) {
    constexpr int MOST_FACTOR = 1024, MOST_STEPS = 64;
    std::vector<MapStep> steps;
    const auto list = taken<nb::list>(given, name, "a list");
    if (list.size() > MOST_STEPS) refuse(name, "a list of at most " + std::to_string(MOST_STEPS));
    for (nb::handle entry : list) {
        const Part part(std::string(name) + "[" + std::to_string(steps.size()) + "]", entry);
        const auto kind = taken<std::string>(part.at("kind"), part.path("kind"), "gather, scale or mix");
        MapStep step;
        const auto floats = [&](const char *key, size_t count) {
            const auto array = part.array<float>(key, count);
            std::vector<float> values(array.data(), array.data() + count);
            if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) refuse(part.path(key), "finite");
            return values;
        };
        if (kind == "gather") {
            const auto array = part.array<int32_t>("order", size_t(columns));
            step.order.assign(array.data(), array.data() + columns);
            for (int32_t c : step.order) need(c >= 0 && c < columns, "order is out of range");
        } else if (kind == "scale") {
            step.kind = MapStep::scale;
            step.values = floats("values", size_t(columns));
        } else if (kind == "mix") {
            step.kind = MapStep::mix;
            step.block = part.whole("block", 1, columns);
            if (columns % step.block) refuse(part.path("block"), "a divisor of the columns");
            step.across = part.whole("across", 1, std::min(step.block, MOST_FACTOR));
            if (step.block % step.across) refuse(part.path("across"), "a divisor of the block");
            const int along = step.block / step.across;
            if (step.across > 1) step.left = floats("left", size_t(step.across) * step.across);
            if (part.has("right")) {
                if (along > MOST_FACTOR) refuse(part.path("across"), "such that no factor is above " + std::to_string(MOST_FACTOR));
                step.right = floats("right", size_t(along) * along);
            } else if (along & (along - 1)) {
                refuse(part.path("across"), "such that the rest of the block is a power of two, or right given");
            }
        } else {
            refuse(part.path("kind"), "gather, scale or mix");
        }
        steps.push_back(std::move(step));
    }
    return steps;
}

void bind_stored(nb::module_ &m) {
    m.def("store_linear", &give, nb::arg("linear"));
    m.def("restore_linear", &take, nb::arg("stored"), nb::rv_policy::take_ownership);
}

}  // namespace bitpress
