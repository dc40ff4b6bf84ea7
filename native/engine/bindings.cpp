// Python's doors to the engine. Every shape and range is checked here, before a pointer is used.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "arguments.h"
#include "codes_given.h"
#include "products.h"
#include "sampling.h"

namespace nb = nanobind;

namespace bitpress {

namespace {

Linear *make_linear(int rows, int columns) {
    need(rows >= 1 && rows <= MOST && columns >= 1 && columns <= MOST, "rows and columns must be positive");
    auto *linear = new Linear;
    linear->rows = rows;
    linear->columns = columns;
    return linear;
}

void add_codes(Linear &l, Bytes2 codes, int bits, int group, const std::string &kind, Bytes2 scales, float gain,
               std::optional<Bytes2> zeros, int zero, std::optional<Array<const uint8_t, 1>> table,
               std::optional<Array<const float, 1>> levels, int threads, int tall, float step, nb::handle shared,
               nb::handle meaning, const std::string &packing, std::optional<Array<const int32_t, 1>> picked, nb::handle less) {
    const int used = checked_threads(threads);
    CodesGiven given{codes, bits, group, kind, scales, gain, zeros, zero, table, levels, tall, step, shared, meaning, less, packing, picked};
    CodedParts parts = take_codes(given, l.rows, l.columns);
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    if (l.rounding) sum_whole(parts.made, *l.rounding);
    l.coded.push_back(lay_out(std::move(parts), used));
}

using Halves = Array<const uint16_t, 2>;
using Row = Array<const float, 1>;

void add_dense(Linear &l, Halves values, bool half, std::optional<Row> gain, int threads) {
    need(is_matrix(values, size_t(l.rows), size_t(l.columns)), "values must be [rows, columns]");
    need(!gain || gain->shape(0) == values.shape(0), "gain must be [rows]");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    l.dense.push_back(lay_out_dense(l.rows, l.columns, values.data(), half, gain ? gain->data() : nullptr, used));
}

void set_low_rank(Linear &l, Halves down, Halves up, bool half, int threads) {
    need(down.shape(0) >= 1 && down.shape(0) <= size_t(MOST), "the rank must be positive");
    need(is_matrix(down, down.shape(0), size_t(l.columns)) && is_matrix(up, size_t(l.rows), down.shape(0)),
         "down must be [rank, columns] and up [rows, rank]");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    const int rank = int(down.shape(0));
    auto first = std::make_unique<Dense>(lay_out_dense(rank, l.columns, down.data(), half, nullptr, used));
    l.up = {std::make_unique<Dense>(lay_out_dense(l.rows, rank, up.data(), half, nullptr, used)), nullptr};
    l.down = {std::move(first), nullptr};
}

// Takes the codes of two layers as the factors of a low-rank product; those layers are empty afterwards.
void set_low_rank_codes(Linear &l, Linear &down, Linear &up) {
    need(&down != &up && &down != &l && &up != &l, "down, up and the layer must be three");
    need(down.columns == l.columns && up.rows == l.rows && up.columns == down.rows, "down must be [rank, columns] and up [rows, rank]");
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill(), of_down = down.turns.fill(), of_up = up.turns.fill();
    need(down.coded.size() == 1 && up.coded.size() == 1, "factors must have one matrix of codes each");
    l.down = {nullptr, std::make_unique<Coded>(std::move(down.coded[0]))};
    l.up = {nullptr, std::make_unique<Coded>(std::move(up.coded[0]))};
    down.coded.clear(), up.coded.clear();
}

void set_sparse(Linear &l, Array<const int64_t, 1> starts, Array<const int32_t, 1> columns, Row values) {
    need(starts.shape(0) == size_t(l.rows) + 1, "starts must be [rows + 1]");
    need(columns.shape(0) == values.shape(0), "columns and values must be equally many");
    const size_t count = columns.shape(0);
    // Copied first: what is checked is what stays, whoever else writes to the arrays.
    std::vector<int64_t> rows(starts.data(), starts.data() + starts.shape(0));
    const std::vector<int32_t> at(columns.data(), columns.data() + count);
    const std::vector<float> all(values.data(), values.data() + count);
    need(rows.front() == 0 && rows.back() == int64_t(count), "starts must go from 0 to the number of values");
    need(std::is_sorted(rows.begin(), rows.end()), "starts must not fall");
    for (int32_t c : at) need(c >= 0 && c < l.columns, "a column is out of range");
    auto sparse = std::make_unique<Sparse>(l.columns, std::move(rows), at.data(), all.data());
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    l.sparse = std::move(sparse);
}

void set_bias(Linear &l, Row bias) {
    need(bias.shape(0) == size_t(l.rows), "bias must be [rows]");
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    l.bias.resize(size_t(l.strips()) * STRIP);
    std::memcpy(l.bias.data(), bias.data(), size_t(l.rows) * sizeof(float));
}

void set_map(Linear &l, nb::handle steps) {
    auto map = InputMap::of(l.columns, take_map(steps, "steps", l.columns));
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    l.map = std::move(map);
}

// Before the codes, which are cut for it.
void set_rounding(Linear &l, nb::handle given) {
    const Rounding rounding = take_rounding({"rounding", given}, l.columns);
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    need(l.coded.empty(), "codes are cut for a rounding: it comes before them");
    l.rounding = rounding;
}

void set_out_map(Linear &l, nb::handle steps) {
    auto map = InputMap::of(l.rows, take_map(steps, "steps", l.rows));
    const nb::gil_scoped_release released;
    const auto turn = l.turns.fill();
    l.out_map = std::move(map);
}

void linear_row(const Linear &l, int row, Array<float, 1> to) {
    need(row >= 0 && row < l.rows, "the row is out of range");
    need(to.shape(0) == size_t(l.columns), "a row needs room for [columns]");
    const nb::gil_scoped_release released;
    const Use use(l);
    l.row(row, to.data());
}

// How products with 8-bit activations read every matrix of codes: "codes", or decoded to "bytes" or "floats" first, or as "integers" beside
// inputs that the model itself rounds.
std::vector<std::string> reads(const Linear &l) {
    const nb::gil_scoped_release released;
    const Use use(l);
    std::vector<std::string> all;
    for (const Coded &m : l.coded) all.emplace_back(m.whole_sums ? "integers" : l.rounding ? "floats" : m.fast() ? "codes" : m.staged_in_bytes() ? "bytes" : "floats");
    return all;
}

size_t linear_bytes(const Linear &l) {
    const nb::gil_scoped_release released;
    const Use use(l);
    return l.bytes();
}

// A row of inputs by the map and the rounding of a layer: codes, and for every run of columns with a scale its zero point and scale.
void round_input(const Linear &l, Array<const float, 1> x, Array<uint8_t, 1> codes, Array<float, 1> scales, Array<int32_t, 1> zeros, const std::string &path) {
    const nb::gil_scoped_release released;
    const Use use(l);
    need(l.rounding.has_value(), "the layer does not round its input");
    const Rounding &r = *l.rounding;
    const Cut cut = make_cut(l.columns, r.run(), chunk_of(8));
    need(x.shape(0) == size_t(l.columns) && codes.shape(0) == x.shape(0), "x and codes must be [columns]");
    need(scales.shape(0) == size_t(cut.groups) && zeros.shape(0) == scales.shape(0), "scales and zeros must be [runs]");
    IntegerRows rows;
    rows.fit(cut, 1, 1);
    const Kernels &kernels = choose_kernels(path.c_str());
    std::vector<float> mapped(x.data(), x.data() + x.shape(0));
    if (l.map) l.map->apply(kernels, x.data(), mapped.data());
    kernels.round_row(mapped.data(), 0, r, rows);
    const auto middle = [&](int b) { return r.range_of(cut.first_column(b)).middle(); };
    for (int b = 0; b < cut.blocks(); ++b) {
        for (int c = 0; c < cut.columns_of(b); ++c) codes.data()[cut.first_column(b) + c] = uint8_t(rows.values[size_t(b) * cut.width + c] + middle(b));
    }
    for (int g = 0; g < cut.groups; ++g) scales.data()[g] = rows.scales[size_t(g)], zeros.data()[g] = rows.less[size_t(g)] + r.range_of(g * cut.group).middle();
}

// Products by themselves: for layers inside another runtime, and for tests.
struct Multiplier {
    const Kernels &kernels;
    Pool pool;
    std::mutex mutex;  // calls from several threads take turns
    Input input;
    std::vector<Scratch> scratch;

    Multiplier(int threads, const std::string &path)
        : kernels(choose_kernels(path.c_str())), pool(checked_threads(threads)), scratch(size_t(threads)) {}

    void multiply(const Linear &l, Array<const float, 2> x, Array<float, 2> out, bool bytes) {
        need(x.shape(1) == size_t(l.columns), "x must be [rows, columns of the layer]");
        need(is_matrix(out, x.shape(0), size_t(l.rows)), "out must be [rows of x, rows of the layer]");
        need(x.shape(0) <= 1 << 20, "at most 1,048,576 rows at once");
        if (x.shape(0) == 0) return;
        const nb::gil_scoped_release released;
        const std::lock_guard<std::mutex> lock(mutex);
        const Use use(l);
        const int rows = int(x.shape(0)), threads = pool.threads();
        input.plan(kernels, {}, 0, bytes);  // another layer may live where the last one was
        input.plan(kernels, {&l}, rows, bytes);
        std::atomic<bool> finite{true};
        pool.run([&](int thread) {
            for (int row = thread; row < rows; row += threads) {
                if (!input.prepare(kernels, x.data() + size_t(row) * l.columns, row)) finite = false;
            }
            pool.wait();
            const std::vector<Product> products{{&l, out.data(), l.rows}};
            bitpress::multiply(kernels, pool, thread, products, input, scratch[size_t(thread)]);
            pool.wait();
            map_outputs(kernels, pool, thread, products, rows);
        });
        if (!finite) throw std::overflow_error("a scale of the inputs is beyond the range of its type");
    }
};

int pick_from(Array<const float, 1> logits, Array<const int32_t, 1> before, const Sampling &how, Random &random) {
    need(logits.shape(0) >= 1 && logits.shape(0) <= size_t(MOST), "logits must not be empty");
    const std::vector<int32_t> all(before.data(), before.data() + before.shape(0));
    for (int32_t token : all) need(token >= 0 && size_t(token) < logits.shape(0), "a token is not in the vocabulary");
    return pick(logits.data(), int(logits.shape(0)), all, how, random);
}

// Bytes a second that threads read from memory that no cache holds.
double read_speed(size_t bytes, int threads) {
    need(bytes >= 1 << 20 && bytes <= size_t(1) << 34, "bytes must be 1 MiB to 16 GiB");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    return measure_reading(bytes, used);
}

double multiply_speed(const std::string &path, int threads) {
    const int used = checked_threads(threads);
    const Kernels &kernels = choose_kernels(path.c_str());
    const nb::gil_scoped_release released;
    return measure_multiplying(kernels, used);
}

std::vector<std::string> paths() {
    std::vector<std::string> names;
    for (const Kernels *path : {amx_kernels(), avx512_kernels(), avx2_kernels(), &portable_kernels()}) {
        if (path != nullptr) names.emplace_back(path->name);
    }
    return names;
}

Sampling *make_sampling(float temperature, int top_k, float top_p, float min_p, float repetition_penalty) {
    need(temperature >= 0 && std::isfinite(temperature), "temperature must not be negative");
    need(top_k >= 0, "top_k must not be negative");
    need(top_p > 0 && top_p <= 1, "top_p must be above 0 and at most 1");
    need(min_p >= 0 && min_p <= 1, "min_p must be 0 to 1");
    need(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty must be positive");
    return new Sampling{temperature, top_k, top_p, min_p, repetition_penalty};
}

}  // namespace

void bind_engine(nb::module_ &m) {
    nb::class_<Linear>(m, "Linear")
        .def(nb::new_(&make_linear), nb::arg("rows"), nb::arg("columns"))
        .def("add_codes", &add_codes, nb::arg("codes").noconvert(), nb::arg("bits"), nb::arg("group"), nb::arg("kind"),
             nb::arg("scales").noconvert(), nb::arg("gain"), nb::arg("zeros").noconvert().none(), nb::arg("zero"),
             nb::arg("table").noconvert().none(), nb::arg("levels").noconvert().none(), nb::arg("threads"), nb::arg("tall") = 1,
             nb::arg("step") = 1.0f, nb::arg("shared") = nb::none(), nb::arg("meaning") = nb::none(),
             nb::arg("packing") = "planes", nb::arg("picked").noconvert().none() = nb::none(), nb::arg("less") = nb::none())
        .def("add_dense", &add_dense, nb::arg("values").noconvert(), nb::arg("half"), nb::arg("gain").noconvert().none(),
             nb::arg("threads"))
        .def("set_low_rank", &set_low_rank, nb::arg("down").noconvert(), nb::arg("up").noconvert(), nb::arg("half"),
             nb::arg("threads"))
        .def("set_low_rank_codes", &set_low_rank_codes, nb::arg("down"), nb::arg("up"))
        .def("set_sparse", &set_sparse, nb::arg("starts").noconvert(), nb::arg("columns").noconvert(),
             nb::arg("values").noconvert())
        .def("set_bias", &set_bias, nb::arg("bias").noconvert())
        .def("set_map", &set_map, nb::arg("steps"))
        .def("set_out_map", &set_out_map, nb::arg("steps"))
        .def("set_rounding", &set_rounding, nb::arg("rounding"))
        .def("round_input", &round_input, nb::arg("x").noconvert(), nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
             nb::arg("zeros").noconvert(), nb::arg("path"))
        .def("row", &linear_row, nb::arg("row"), nb::arg("to").noconvert())
        .def_prop_ro("rows", [](const Linear &l) { return l.rows; })
        .def_prop_ro("columns", [](const Linear &l) { return l.columns; })
        .def_prop_ro("nbytes", &linear_bytes)
        .def_prop_ro("reads", &reads);
    nb::class_<Multiplier>(m, "Multiplier")
        .def(nb::init<int, const std::string &>(), nb::arg("threads"), nb::arg("path"))
        .def("multiply", &Multiplier::multiply, nb::arg("linear"), nb::arg("x").noconvert(), nb::arg("out").noconvert(),
             nb::arg("bytes"))
        .def_prop_ro("path", [](const Multiplier &x) { return x.kernels.name; });
    nb::class_<Sampling>(m, "Sampling")
        .def(nb::new_(&make_sampling), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
             nb::arg("repetition_penalty"));
    nb::class_<Random>(m, "Random").def(nb::init<uint64_t>(), nb::arg("seed"));
    m.def("pick", &pick_from, nb::arg("logits").noconvert(), nb::arg("before").noconvert(), nb::arg("how"), nb::arg("random"));
    m.def("paths", &paths);
    m.def("read_speed", &read_speed, nb::arg("bytes"), nb::arg("threads"));
    m.def("multiply_speed", &multiply_speed, nb::arg("path"), nb::arg("threads"));
    bind_maps(m);
    bind_models(m);
    bind_stored(m);
}

}  // namespace bitpress
