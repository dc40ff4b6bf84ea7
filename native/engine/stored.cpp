// Linear layers as plain arrays and back, so that a layout can be written to a file and mapped from it: nothing is laid out twice.
//
// Coming back, the large arrays (codes and sixteen-bit weights) are used where they lie, which Python keeps alive; the rest is copied.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "arguments.h"
#include "bindings.h"
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

nb::dict give_coded(const Coded &m, nb::handle owner) {
    nb::dict d;
    d["bits"] = m.bits, d["group"] = m.cut.group, d["zero"] = m.zero, d["kind"] = int(m.kind), d["gain"] = m.gain;
    d["has_zeros"] = m.has_zeros, d["has_table"] = m.has_table;
    d["table"] = as_array(m.table, 16, owner);
    d["levels"] = as_array(m.levels, 16, owner);
    d["lines"] = as_array(m.lines.data(), m.lines.size(), owner);
    d["scales"] = as_array(m.scales.data(), m.scales.size(), owner);
    if (m.has_zeros) d["zeros"] = as_array(m.zeros.data(), m.zeros.size(), owner);
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
    if (l.down != nullptr) d["down"] = give_dense(*l.down, self), d["up"] = give_dense(*l.up, self);
    if (l.sparse != nullptr) {
        nb::dict s;
        s["starts"] = as_array(l.sparse->starts.data(), l.sparse->starts.size(), self);
        s["columns"] = as_array(l.sparse->columns.data(), l.sparse->columns.size(), self);
        s["values"] = as_array(l.sparse->values.data(), l.sparse->values.size(), self);
        d["sparse"] = s;
    }
    if (l.bias.size()) d["bias"] = as_array(l.bias.data(), l.bias.size(), self);
    if (l.map) d["map"] = give_map(*l.map, self);
    return d;
}

// ---- from arrays ----

Coded take_coded(const Part &part, int rows, int columns, nb::list &kept) {
    Coded m;
    m.rows = rows;
    m.bits = part.whole("bits", 1, 8);
    m.zero = part.whole("zero", 0, 255);
    m.kind = ScaleKind(part.whole("kind", 0, int(ScaleKind::e4m3)));
    m.gain = part.number("gain");
    m.cut = make_cut(columns, part.whole("group", 1, columns), m.bits);
    m.has_zeros = part.claim("has_zeros");
    m.has_table = part.claim("has_table");
    need(!m.has_table || (m.bits <= 4 && !m.has_zeros && m.zero == 128), "a table is for codes of at most 4 bits without zero points");
    std::memcpy(m.table, part.array<uint8_t>("table", 16).data(), 16);
    std::memcpy(m.levels, part.array<float>("levels", 16).data(), 64);
    for (float level : m.levels) need(std::isfinite(level), "levels must be finite");
    const size_t strips = size_t(m.strips()), groups = strips * m.cut.groups * STRIP;
    borrow_array(part, "lines", strips * m.cut.blocks() * m.block_bytes(), m.lines, kept);
    copy_array(part, "scales", groups * scale_bytes(m.kind), m.scales);
    if (m.has_zeros) copy_array(part, "zeros", groups, m.zeros);
    for (size_t i = 0; i < m.zeros.size(); ++i) need(m.zeros[i] < 1 << m.bits, "a zero point is too large for the bits of the codes");
    m.find_reach();
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

std::unique_ptr<Sparse> take_sparse(const Part &part, int rows, int columns) {
    const auto starts = part.array<int64_t>("starts", size_t(rows) + 1);
    auto sparse = std::make_unique<Sparse>();
    sparse->starts.assign(starts.data(), starts.data() + rows + 1);
    const int64_t count = sparse->starts.back();
    need(sparse->starts.front() == 0 && count <= int64_t(rows) * columns, "starts must go from 0 to the number of values");
    need(std::is_sorted(sparse->starts.begin(), sparse->starts.end()), "starts must not fall");
    const auto given = part.array<int32_t>("columns", size_t(count));
    const auto values = part.array<float>("values", size_t(count));
    sparse->columns.assign(given.data(), given.data() + count);
    sparse->values.assign(values.data(), values.data() + count);
    for (int32_t c : sparse->columns) need(c >= 0 && c < columns, "a column is out of range");
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
    each_part(part, "coded", [&](const Part &given) { l->coded.push_back(take_coded(given, l->rows, l->columns, kept)); });
    each_part(part, "dense", [&](const Part &given) { l->dense.push_back(take_dense(given, l->rows, l->columns, kept)); });
    if (part.has("down")) {
        const Part down(part.path("down"), part.at("down")), up(part.path("up"), part.at("up"));
        const int rank = down.whole("rows", 1);
        l->down = std::make_unique<Dense>(take_dense(down, rank, l->columns, kept));
        l->up = std::make_unique<Dense>(take_dense(up, l->rows, rank, kept));
    }
    if (part.has("sparse")) l->sparse = take_sparse({part.path("sparse"), part.at("sparse")}, l->rows, l->columns);
    if (part.has("bias")) copy_array(part, "bias", size_t(l->strips()) * STRIP, l->bias);
    if (part.has("map")) l->map = InputMap::of(l->columns, take_map(part.at("map"), "stored.map", l->columns));
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
