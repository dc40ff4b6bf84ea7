// Python's doors to the engine. Every shape and range is checked here, before a pointer is used.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "decoder.h"
#include "sampling.h"

namespace nb = nanobind;

namespace bitpress {

namespace {

template <typename T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void need(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(what);
}

constexpr int MOST = 1 << 30;

int checked_threads(int threads) {
    need(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    return threads;
}

ScaleKind scale_kind(const std::string &name) {
    static const std::map<std::string, ScaleKind> kinds = {{"fp32", ScaleKind::f32},
                                                           {"fp16", ScaleKind::f16},
                                                           {"bf16", ScaleKind::bf16},
                                                           {"e8m0", ScaleKind::e8m0},
                                                           {"fp8", ScaleKind::e4m3}};
    const auto found = kinds.find(name);
    need(found != kinds.end(), "scales must be fp32, fp16, bf16, e8m0 or fp8");
    return found->second;
}

using Bytes2 = Array<const uint8_t, 2>;

Linear *make_linear(int rows, int columns) {
    need(rows >= 1 && rows <= MOST && columns >= 1 && columns <= MOST, "rows and columns must be positive");
    auto *linear = new Linear;
    linear->rows = rows;
    linear->columns = columns;
    return linear;
}

void add_codes(Linear &l, Bytes2 codes, int bits, int group, const std::string &kind, Bytes2 scales, float gain,
               std::optional<Bytes2> zeros, int zero, std::optional<Array<const uint8_t, 1>> table,
               std::optional<Array<const float, 1>> levels, int threads) {
    need(bits >= 1 && bits <= 8, "bits must be 1 to 8");
    need(group >= 1 && group <= l.columns, "group must be 1 to the number of columns");
    need(int(codes.shape(0)) == l.rows && int(codes.shape(1)) == l.columns, "codes must be [rows, columns]");
    const size_t groups = (size_t(l.columns) + group - 1) / group;
    need(scales.shape(0) == codes.shape(0) && scales.shape(1) == groups * scale_bytes(scale_kind(kind)),
         "scales must be the bytes of [rows, groups]");
    need(!zeros || (zeros->shape(0) == codes.shape(0) && zeros->shape(1) == groups), "zeros must be [rows, groups]");
    need(zero >= 0 && zero <= 255, "zero must be 0 to 255");
    need(std::isfinite(gain), "gain must be finite");
    need(table.has_value() == levels.has_value(), "a table has both bytes and levels");
    need(!table || (bits <= 4 && !zeros && table->shape(0) == 16 && levels->shape(0) == 16),
         "a table has 16 bytes and 16 levels, for codes of at most 4 bits without zero points");
    const uint8_t top = uint8_t((1 << bits) - 1);
    uint8_t largest = 0;
    for (size_t i = 0; i < codes.size(); ++i) largest = std::max(largest, codes.data()[i]);
    need(largest <= top, "a code is too large for its bits");
    const CodedParts parts{l.rows,
                           l.columns,
                           bits,
                           group,
                           codes.data(),
                           scale_kind(kind),
                           scales.data(),
                           gain,
                           zeros ? zeros->data() : nullptr,
                           zero,
                           table ? table->data() : nullptr,
                           levels ? levels->data() : nullptr};
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    l.coded.push_back(lay_out(parts, used));
}

using Halves = Array<const uint16_t, 2>;
using Row = Array<const float, 1>;

void add_dense(Linear &l, Halves values, bool half, std::optional<Row> gain, int threads) {
    need(int(values.shape(0)) == l.rows && int(values.shape(1)) == l.columns, "values must be [rows, columns]");
    need(!gain || gain->shape(0) == values.shape(0), "gain must be [rows]");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    l.dense.push_back(lay_out_dense(l.rows, l.columns, values.data(), half, gain ? gain->data() : nullptr, used));
}

void set_low_rank(Linear &l, Halves down, Halves up, bool half, int threads) {
    need(int(down.shape(1)) == l.columns && int(up.shape(0)) == l.rows && down.shape(0) == up.shape(1) && down.shape(0) >= 1,
         "down must be [rank, columns] and up [rows, rank]");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    const int rank = int(down.shape(0));
    l.down = std::make_unique<Dense>(lay_out_dense(rank, l.columns, down.data(), half, nullptr, used));
    l.up = std::make_unique<Dense>(lay_out_dense(l.rows, rank, up.data(), half, nullptr, used));
}

void set_sparse(Linear &l, Array<const int64_t, 1> starts, Array<const int32_t, 1> columns, Row values) {
    need(int64_t(starts.shape(0)) == int64_t(l.rows) + 1, "starts must be [rows + 1]");
    need(columns.shape(0) == values.shape(0), "columns and values must be equally many");
    const int64_t count = int64_t(columns.shape(0));
    need(starts(0) == 0 && starts(size_t(l.rows)) == count, "starts must go from 0 to the number of values");
    for (int r = 0; r < l.rows; ++r) need(starts(size_t(r)) <= starts(size_t(r) + 1), "starts must not fall");
    for (int64_t i = 0; i < count; ++i) {
        need(columns(size_t(i)) >= 0 && columns(size_t(i)) < l.columns, "a column is out of range");
    }
    auto sparse = std::make_unique<Sparse>();
    sparse->starts.assign(starts.data(), starts.data() + l.rows + 1);
    sparse->columns.assign(columns.data(), columns.data() + count);
    sparse->values.assign(values.data(), values.data() + count);
    l.sparse = std::move(sparse);
}

void set_bias(Linear &l, Row bias) {
    need(int(bias.shape(0)) == l.rows, "bias must be [rows]");
    l.bias.resize(size_t(l.strips()) * STRIP);
    std::memcpy(l.bias.data(), bias.data(), size_t(l.rows) * sizeof(float));
}

void set_order(Linear &l, Array<const int32_t, 1> order) {
    need(int(order.shape(0)) == l.columns, "order must be [columns]");
    for (int c = 0; c < l.columns; ++c) need(order(size_t(c)) >= 0 && order(size_t(c)) < l.columns, "order is out of range");
    l.order.assign(order.data(), order.data() + l.columns);
}

void linear_row(const Linear &l, int row, Array<float, 1> to) {
    need(row >= 0 && row < l.rows && int(to.shape(0)) == l.columns, "row out of range, or no room for it");
    l.row(row, to.data());
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
        need(int(x.shape(1)) == l.columns, "x must be [rows, columns of the layer]");
        need(out.shape(0) == x.shape(0) && int(out.shape(1)) == l.rows, "out must be [rows of x, rows of the layer]");
        need(x.shape(0) <= 1 << 20, "at most 1,048,576 rows at once");
        if (x.shape(0) == 0) return;
        const nb::gil_scoped_release released;
        const std::lock_guard<std::mutex> lock(mutex);
        const int rows = int(x.shape(0)), threads = pool.threads();
        input.plan({}, 0, bytes);  // another layer may live where the last one was
        input.plan({&l}, rows, bytes);
        pool.run([&](int thread) {
            for (int row = thread; row < rows; row += threads) input.prepare(kernels, x.data() + size_t(row) * l.columns, row);
            pool.wait();
            bitpress::multiply(kernels, pool, thread, {{&l, out.data(), l.rows}}, input, scratch[size_t(thread)]);
        });
    }
};

// A decoder with what Python gave it: the layers stay alive as long as it does.
struct Model {
    std::vector<nb::object> kept;
    std::unique_ptr<Decoder> decoder;
    std::vector<int32_t> tokens;  // those in the cache
    std::mutex mutex;
};

std::vector<float> floats(nb::handle given, size_t size, bool may_miss, const char *what) {
    if (given.is_none()) {
        need(may_miss, what);
        return {};
    }
    const auto array = nb::cast<Array<const float, 1>>(given);
    need(size == 0 || array.shape(0) == size, what);
    return {array.data(), array.data() + array.shape(0)};
}

Model *make_model(nb::dict shape, nb::list layers, nb::list ropes, nb::object embedding, nb::object head, int threads,
                  bool byte_activations, bool byte_cache, const std::string &path) {
    auto model = std::make_unique<Model>();
    auto linear = [&](nb::handle given, int rows, int columns, const char *what) -> const Linear * {
        const auto *l = nb::cast<const Linear *>(given);
        need(l != nullptr && l->rows == rows && l->columns == columns, what);
        model->kept.push_back(nb::borrow(given));
        return l;
    };
    auto whole = [&](const char *key) {
        const int value = nb::cast<int>(shape[key]);
        need(value >= 1 && value <= MOST, "sizes of the model must be positive");
        return value;
    };
    DecoderShape s;
    s.hidden = whole("hidden"), s.heads = whole("heads"), s.kv_heads = whole("kv_heads"), s.head = whole("head");
    s.vocabulary = whole("vocabulary"), s.context = whole("context");
    const int inner = whole("intermediate");
    need(s.heads % s.kv_heads == 0, "heads must be a multiple of kv_heads");
    need(s.head % 16 == 0 && s.head <= 512, "the size of a head must be a multiple of 16, 512 at most");
    need(int64_t(s.heads) * s.head <= MOST && s.heads / s.kv_heads <= 64, "too many heads");
    s.eps = nb::cast<float>(shape["eps"]);
    s.attention_scale = nb::cast<float>(shape["attention_scale"]);
    s.embedding_scale = nb::cast<float>(shape["embedding_scale"]);
    s.tanh_gelu = nb::cast<bool>(shape["tanh_gelu"]);
    s.final_norm = floats(shape["final_norm"], size_t(s.hidden), false, "final_norm must be [hidden]");
    std::vector<Rope> rotations;
    for (nb::handle given : ropes) {
        const auto pair = nb::cast<nb::tuple>(given);
        Rope rope{floats(pair[0], 0, false, "frequencies"), nb::cast<float>(pair[1])};
        need(rope.frequencies.size() >= 1 && rope.frequencies.size() * 2 <= size_t(s.head), "more frequencies than half a head");
        rotations.push_back(std::move(rope));
    }
    std::vector<LayerWeights> all;
    const int q = s.heads * s.head, kv = s.kv_heads * s.head;
    const size_t hidden = size_t(s.hidden), part = size_t(s.head);
    for (nb::handle given : layers) {
        const auto layer = nb::cast<nb::dict>(given);
        LayerWeights l;
        l.q = linear(layer["q"], q, s.hidden, "q must be [heads * head, hidden]");
        l.k = linear(layer["k"], kv, s.hidden, "k must be [kv_heads * head, hidden]");
        l.v = linear(layer["v"], kv, s.hidden, "v must be [kv_heads * head, hidden]");
        l.o = linear(layer["o"], s.hidden, q, "o must be [hidden, heads * head]");
        l.gate = linear(layer["gate"], inner, s.hidden, "gate must be [intermediate, hidden]");
        l.up = linear(layer["up"], inner, s.hidden, "up must be [intermediate, hidden]");
        l.down = linear(layer["down"], s.hidden, inner, "down must be [hidden, intermediate]");
        l.input_norm = floats(layer["input_norm"], hidden, false, "input_norm must be [hidden]");
        l.mlp_norm = floats(layer["mlp_norm"], hidden, false, "mlp_norm must be [hidden]");
        l.attention_out_norm = floats(layer["attention_out_norm"], hidden, true, "attention_out_norm must be [hidden]");
        l.mlp_out_norm = floats(layer["mlp_out_norm"], hidden, true, "mlp_out_norm must be [hidden]");
        l.q_norm = floats(layer["q_norm"], part, true, "q_norm must be [head]");
        l.k_norm = floats(layer["k_norm"], part, true, "k_norm must be [head]");
        l.rope = nb::cast<int>(layer["rope"]);
        l.window = nb::cast<int>(layer["window"]);
        need(l.rope >= -1 && l.rope < int(rotations.size()), "rope names a rotation that is not there");
        need(l.window >= 0, "window must not be negative");
        all.push_back(std::move(l));
    }
    need(!all.empty(), "a decoder needs a layer");
    const Linear *table = linear(embedding, s.vocabulary, s.hidden, "embedding must be [vocabulary, hidden]");
    const Linear *top = linear(head, s.vocabulary, s.hidden, "head must be [vocabulary, hidden]");
    model->decoder = std::make_unique<Decoder>(std::move(s), std::move(all), std::move(rotations), table, top,
                                               checked_threads(threads), byte_activations, byte_cache, path.c_str());
    return model.release();
}

const float *forward(Model &m, const Array<const int32_t, 1> &tokens, bool all) {
    Decoder &d = *m.decoder;
    const int count = int(tokens.shape(0));
    need(count >= 1 && tokens.shape(0) <= 1 << 20, "give 1 to 1,048,576 tokens");
    need(count <= d.shape().context - d.length(), "the context has no room for so many tokens");
    for (int i = 0; i < count; ++i) {
        need(tokens(size_t(i)) >= 0 && tokens(size_t(i)) < d.shape().vocabulary, "a token is not in the vocabulary");
    }
    m.tokens.resize(size_t(d.length()));
    const float *logits = d.forward(tokens.data(), count, all);
    m.tokens.insert(m.tokens.end(), tokens.data(), tokens.data() + count);
    return logits;
}

// Fills `to` with the logits of the last token, or of all: [rows, vocabulary]. With no rows, only the cache grows.
void model_forward(Model &m, Array<const int32_t, 1> tokens, Array<float, 2> to) {
    const size_t rows = to.shape(0);
    need(rows <= 1 || rows == tokens.shape(0), "logits must have no row, one, or one for every token");
    need(int(to.shape(1)) == m.decoder->shape().vocabulary, "logits must be [rows, vocabulary]");
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(m.mutex);
    const float *logits = forward(m, tokens, rows > 1);
    std::memcpy(to.data(), logits, to.size() * sizeof(float));
}

int model_step(Model &m, Array<const int32_t, 1> tokens, const Sampling &how, Random &random) {
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(m.mutex);
    const float *logits = forward(m, tokens, false);
    return pick(logits, m.decoder->shape().vocabulary, m.tokens, how, random);
}

void model_truncate(Model &m, int length) {
    const std::lock_guard<std::mutex> lock(m.mutex);
    need(length >= 0 && length <= m.decoder->length(), "the cache is not so long");
    m.decoder->truncate(length);
    m.tokens.resize(size_t(length));
}

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
             nb::arg("table").noconvert().none(), nb::arg("levels").noconvert().none(), nb::arg("threads"))
        .def("add_dense", &add_dense, nb::arg("values").noconvert(), nb::arg("half"), nb::arg("gain").noconvert().none(),
             nb::arg("threads"))
        .def("set_low_rank", &set_low_rank, nb::arg("down").noconvert(), nb::arg("up").noconvert(), nb::arg("half"),
             nb::arg("threads"))
        .def("set_sparse", &set_sparse, nb::arg("starts").noconvert(), nb::arg("columns").noconvert(),
             nb::arg("values").noconvert())
        .def("set_bias", &set_bias, nb::arg("bias").noconvert())
        .def("set_order", &set_order, nb::arg("order").noconvert())
        .def("row", &linear_row, nb::arg("row"), nb::arg("to").noconvert())
        .def_prop_ro("rows", [](const Linear &l) { return l.rows; })
        .def_prop_ro("columns", [](const Linear &l) { return l.columns; })
        .def_prop_ro("nbytes", &Linear::bytes);
    nb::class_<Multiplier>(m, "Multiplier")
        .def(nb::init<int, const std::string &>(), nb::arg("threads"), nb::arg("path"))
        .def("multiply", &Multiplier::multiply, nb::arg("linear"), nb::arg("x").noconvert(), nb::arg("out").noconvert(),
             nb::arg("bytes"))
        .def_prop_ro("path", [](const Multiplier &x) { return x.kernels.name; });
    nb::class_<Sampling>(m, "Sampling")
        .def(nb::new_(&make_sampling), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
             nb::arg("repetition_penalty"));
    nb::class_<Random>(m, "Random").def(nb::init<uint64_t>(), nb::arg("seed"));
    nb::class_<Model>(m, "Model")
        .def(nb::new_(&make_model), nb::arg("shape"), nb::arg("layers"), nb::arg("ropes"), nb::arg("embedding"), nb::arg("head"),
             nb::arg("threads"), nb::arg("byte_activations"), nb::arg("byte_cache"), nb::arg("path"))
        .def("forward", &model_forward, nb::arg("tokens").noconvert(), nb::arg("to").noconvert())
        .def("step", &model_step, nb::arg("tokens").noconvert(), nb::arg("how"), nb::arg("random"))
        .def("truncate", &model_truncate, nb::arg("length"))
        .def("take_times",
             [](Model &x) {
                 nb::dict times;
                 const auto seconds = x.decoder->take_times();
                 for (int i = 0; i < Decoder::PARTS; ++i) times[Decoder::part_names[i]] = seconds[size_t(i)];
                 return times;
             })
        .def_prop_ro("length", [](const Model &x) { return x.decoder->length(); })
        .def_prop_ro("path", [](const Model &x) { return x.decoder->path(); })
        .def_prop_ro("threads", [](const Model &x) { return x.decoder->threads(); })
        .def_prop_ro("cache_bytes_per_position", [](const Model &x) { return x.decoder->cache_bytes_per_position(); });
    m.def("pick", &pick_from, nb::arg("logits").noconvert(), nb::arg("before").noconvert(), nb::arg("how"), nb::arg("random"));
    m.def("paths", &paths);
    m.def("read_speed", &read_speed, nb::arg("bytes"), nb::arg("threads"));
    m.def("multiply_speed", &multiply_speed, nb::arg("path"), nb::arg("threads"));
}

}  // namespace bitpress
