// Python's doors to whole models and their texts. Every shape, range and name of a value is checked here, before a pointer is used.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "arguments.h"
#include "bindings.h"
#include "decoder.h"
#include "sampling.h"

namespace nb = nanobind;

namespace bitpress {

namespace {

// What a model is made of, which stays alive, and as it is, as long as it does.
struct Kept {
    std::vector<nb::object> objects;
    std::vector<Use> uses;
};

struct Model {
    Kept kept;
    std::unique_ptr<Decoder> decoder;
    std::mutex mutex;
};

struct Text {
    std::unique_ptr<Sequence> sequence;
    std::mutex mutex;
};

constexpr int ANY = -1;

const Linear *take_linear(Kept &kept, nb::handle given, int rows, int columns, const std::string &part) {
    const auto *l = taken<const Linear *>(given, part, "a Linear");
    if (l == nullptr) throw nb::type_error((part + " must be a Linear").c_str());
    if ((rows != ANY && l->rows != rows) || l->columns != columns) {
        const auto shape = [](int a, int b) { return "[" + (a == ANY ? "any" : std::to_string(a)) + ", " + std::to_string(b) + "]"; };
        refuse(part, shape(rows, columns) + ", not " + shape(l->rows, l->columns));
    }
    kept.objects.push_back(nb::borrow(given));
    kept.uses.emplace_back(*l);
    return l;
}

DecoderShape take_shape(const Part &part) {
    DecoderShape s;
    s.hidden = part.whole("hidden", 1), s.heads = part.whole("heads", 1), s.kv_heads = part.whole("kv_heads", 1);
    s.head = part.whole("head", 1), s.vocabulary = part.whole("vocabulary", 1), s.context = part.whole("context", 1);
    need(s.heads % s.kv_heads == 0, "shape.heads must be a multiple of shape.kv_heads");
    need(s.head % 16 == 0 && s.head <= MOST_HEAD, "shape.head must be a multiple of 16, 512 at most");
    need(int64_t(s.heads) * s.head <= MOST && s.heads / s.kv_heads <= 64, "too many heads");
    need(int64_t(s.context) * s.head <= MOST, "shape.context times shape.head must be at most 1,073,741,824");
    s.eps = part.number("eps"), s.attention_scale = part.number("attention_scale");
    s.embedding_scale = part.number("embedding_scale"), s.tanh_gelu = part.claim("tanh_gelu");
    s.final_norm = part.vector("final_norm", s.hidden);
    return s;
}

Rope take_rope(nb::handle given, int head, const std::string &part) {
    const auto pair = taken<nb::tuple>(given, part, "a tuple of frequencies and a factor");
    if (pair.size() != 2) refuse(part, "a tuple of frequencies and a factor");
    Rope rope{vector_of(pair[0], part + "[0]"), taken<float>(pair[1], part + "[1]", "a number")};
    if (rope.frequencies.empty() || rope.frequencies.size() * 2 > size_t(head)) refuse(part, "of 1 to shape.head / 2 frequencies");
    return rope;
}

// Values of one sort by their names, which steps write and read: every one once written and then read, an output only once.
class Values {
  public:
    explicit Values(bool read_once) : read_once_(read_once) {}

    // A value of this name, made by the step at hand; the same name has the same number in every layer.
    int make(const std::string &part, const std::string &name, int width) {
        if (layer_.contains(name)) refuse(part, "a name that no step of the layer before it has");
        layer_[name] = {width, false};
        const int number = numbers_.try_emplace(name, int(numbers_.size())).first->second;
        if (size_t(number) == widest.size()) widest.push_back(width);
        widest[size_t(number)] = std::max(widest[size_t(number)], width);
        return number;
    }
    // The number and the width of a value that an earlier step of the layer made.
    std::pair<int, int> read(const Part &part, const char *key) {
        const auto name = taken<std::string>(part.at(key), part.path(key), "the name of a value");
        const auto found = layer_.find(name);
        if (found == layer_.end()) refuse(part.path(key), "a value of its sort that a step before it makes");
        if (read_once_ && found->second.read) refuse(part.path(key), "a value that no other step reads");
        found->second.read = true;
        return {numbers_.at(name), found->second.width};
    }
    int read_of_width(const Part &part, const char *key, int width) {
        const auto [number, found] = read(part, key);
        if (found != width) refuse(part.path(key), "a value of " + std::to_string(width) + " columns, not " + std::to_string(found));
        return number;
    }
    void end_layer(const std::string &layer) {
        for (const auto &[name, value] : layer_) {
            if (!value.read) refuse(layer, "of steps that read all values; none reads " + name);
        }
        layer_.clear();
    }
    std::vector<int> widest;  // by number

  private:
    struct Value {
        int width;
        bool read;
    };
    const bool read_once_;
    std::map<std::string, Value> layer_;
    std::map<std::string, int> numbers_;
};

// Reads the steps of one layer after the other.
class ProgramReader {
  public:
    ProgramReader(Kept &kept, const DecoderShape &shape, int ropes) : kept_(kept), shape_(shape), ropes_(ropes) {}

    Program take(nb::list layers) {
        for (nb::handle given : layers) take_layer("layers[" + std::to_string(program_.layers.size()) + "]", given);
        need(!program_.layers.empty(), "a decoder needs a layer");
        program_.inputs = int(inputs_.widest.size());
        program_.outputs = outputs_.widest;
        return std::move(program_);
    }

  private:
    void take_layer(const std::string &name, nb::handle given) {
        layer_ = {};
        for (nb::handle step : taken<nb::list>(given, name, "a list of steps")) {
            layer_.steps.push_back(take_step({name + "[" + std::to_string(layer_.steps.size()) + "]", step}));
        }
        if (layer_.steps.empty()) refuse(name, "of one step at least");
        inputs_.end_layer(name), outputs_.end_layer(name);
        program_.layers.push_back(std::move(layer_));
    }

    Step take_step(const Part &part) {
        static const std::map<std::string, Step (ProgramReader::*)(const Part &)> kinds = {{"norm", &ProgramReader::take_norm},
                                                                                           {"multiply", &ProgramReader::take_multiply},
                                                                                           {"attend", &ProgramReader::take_attend},
                                                                                           {"gate", &ProgramReader::take_gate},
                                                                                           {"add", &ProgramReader::take_add}};
        const auto found = kinds.find(taken<std::string>(part.at("step"), part.path("step"), "the name of a step"));
        if (found == kinds.end()) refuse(part.path("step"), "norm, multiply, attend, gate or add");
        return (this->*found->second)(part);
    }

    Step take_norm(const Part &part) {
        Norm step;
        step.weight = part.vector("weight", shape_.hidden);
        step.to = make_input(part, shape_.hidden);
        return step;
    }

    Step take_multiply(const Part &part) {
        Multiply step;
        const auto [of, width] = inputs_.read(part, "of");
        step.of = of;
        const Part linears(part.path("linears"), part.at("linears"));
        for (const auto [key, given] : linears.values) {
            const auto name = taken<std::string>(key, linears.name, "a dictionary of names");
            const Linear *linear = take_linear(kept_, given, ANY, width, linears.path(name.c_str()));
            step.linears.push_back(linear);
            step.to.push_back(outputs_.make(linears.path(name.c_str()), name, linear->rows));
            read_by(of, linear);
        }
        if (step.linears.empty()) refuse(linears.name, "of one layer at least");
        return step;
    }

    Step take_attend(const Part &part) {
        Attend step;
        const int q = shape_.heads * shape_.head, kv = shape_.kv_heads * shape_.head;
        step.queries = outputs_.read_of_width(part, "queries", q);
        step.keys = outputs_.read_of_width(part, "keys", kv), step.values = outputs_.read_of_width(part, "values", kv);
        step.q_norm = part.vector("q_norm", shape_.head, true), step.k_norm = part.vector("k_norm", shape_.head, true);
        step.rope = taken<int>(part.at("rope"), part.path("rope"), "a whole number of 32 bits");
        if (step.rope < -1 || step.rope >= ropes_) refuse(part.path("rope"), "-1 or the index of a rotation");
        step.window = part.whole("window", 0);
        step.cache = program_.attentions++;
        step.to = make_input(part, q);
        return step;
    }

    Step take_gate(const Part &part) {
        Gate step;
        const auto [of, width] = inputs_.read(part, "of");
        step.of = of;
        step.gate = take_linear(kept_, part.at("gate"), ANY, width, part.path("gate"));
        step.up = take_linear(kept_, part.at("up"), step.gate->rows, width, part.path("up"));
        read_by(of, step.gate), read_by(of, step.up);
        program_.inner = std::max(program_.inner, step.gate->rows);
        step.to = make_input(part, step.gate->rows);
        return step;
    }

    Step take_add(const Part &part) {
        Add step;
        step.of = outputs_.read_of_width(part, "of", shape_.hidden);
        step.norm = part.vector("norm", shape_.hidden, true);
        return step;
    }

    int make_input(const Part &part, int width) {
        return inputs_.make(part.path("to"), taken<std::string>(part.at("to"), part.path("to"), "the name of a value"), width);
    }

    void read_by(int input, const Linear *linear) {
        if (layer_.readers.size() <= size_t(input)) layer_.readers.resize(size_t(input) + 1);
        layer_.readers[size_t(input)].push_back(linear);
    }

    Kept &kept_;
    const DecoderShape &shape_;
    const int ropes_;
    Values inputs_{false}, outputs_{true};
    Layer layer_;
    Program program_;
};

Model *make_model(nb::dict shape, nb::list layers, nb::list ropes, nb::object embedding, nb::object head, int threads,
                  bool byte_activations, bool float_prompts, const std::string &cache, const std::string &path) {
    auto model = std::make_unique<Model>();
    DecoderShape s = take_shape(Part("shape", shape));
    std::vector<Rope> rotations;
    for (nb::handle given : ropes) rotations.push_back(take_rope(given, s.head, "ropes[" + std::to_string(rotations.size()) + "]"));
    Program program = ProgramReader(model->kept, s, int(rotations.size())).take(layers);
    const Linear *table = take_linear(model->kept, embedding, s.vocabulary, s.hidden, "embedding");
    const Linear *top = take_linear(model->kept, head, s.vocabulary, s.hidden, "head");
    const DecoderOptions options{checked_threads(threads), byte_activations, float_prompts, cache.c_str(), path.c_str()};
    model->decoder = std::make_unique<Decoder>(std::move(s), std::move(program), std::move(rotations), table, top, options);
    return model.release();
}

Text *make_text(const Model &m) {
    auto text = std::make_unique<Text>();
    text->sequence = m.decoder->sequence();
    return text.release();
}

// What is checked is what is run, whoever else writes to the array.
std::vector<int32_t> copy_of(const Array<const int32_t, 1> &tokens) { return {tokens.data(), tokens.data() + tokens.shape(0)}; }

const float *run(Model &m, Text &text, const std::vector<int32_t> &tokens, bool all) {
    Decoder &d = *m.decoder;
    need(text.sequence->model() == d.serial(), "the sequence is one of another model");
    need(!tokens.empty() && tokens.size() <= 1 << 20, "give 1 to 1,048,576 tokens");
    need(tokens.size() <= size_t(text.sequence->room()), "the context has no room for so many tokens");
    for (int32_t token : tokens) need(token >= 0 && token < d.shape().vocabulary, "a token is not in the vocabulary");
    return d.forward(*text.sequence, tokens.data(), int(tokens.size()), all);
}

// Fills `to` with the logits of the last token, or of all: [rows, vocabulary]. With no rows, only the cache grows.
void model_forward(Model &m, Text &text, Array<const int32_t, 1> tokens, Array<float, 2> to) {
    const size_t rows = to.shape(0);
    need(rows <= 1 || rows == tokens.shape(0), "logits must have no row, one, or one for every token");
    need(to.shape(1) == size_t(m.decoder->shape().vocabulary), "logits must be [rows, vocabulary]");
    const std::vector<int32_t> given = copy_of(tokens);
    const nb::gil_scoped_release released;
    const std::scoped_lock lock(m.mutex, text.mutex);
    const float *logits = run(m, text, given, rows > 1);
    std::memcpy(to.data(), logits, to.size() * sizeof(float));
}

int model_step(Model &m, Text &text, Array<const int32_t, 1> tokens, const Sampling &how, Random &random) {
    const std::vector<int32_t> given = copy_of(tokens);
    const nb::gil_scoped_release released;
    const std::scoped_lock lock(m.mutex, text.mutex);
    const float *logits = run(m, text, given, false);
    return pick(logits, m.decoder->shape().vocabulary, text.sequence->tokens(), how, random);
}

void text_truncate(Text &text, int length) {
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(text.mutex);
    need(length >= 0 && length <= text.sequence->length(), "the cache is not so long");
    text.sequence->truncate(length);
}

int text_length(Text &text) {
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> lock(text.mutex);
    return text.sequence->length();
}

nb::dict model_times(Model &m) {
    std::vector<double> seconds;
    {
        const nb::gil_scoped_release released;
        const std::lock_guard<std::mutex> lock(m.mutex);
        seconds = m.decoder->take_times();
    }
    nb::dict times;
    for (int i = 0; i < Decoder::PARTS; ++i) times[Decoder::part_names[i]] = seconds[size_t(i)];
    return times;
}

}  // namespace

void bind_models(nb::module_ &m) {
    nb::class_<Text>(m, "Sequence").def("truncate", &text_truncate, nb::arg("length")).def_prop_ro("length", &text_length);
    nb::class_<Model>(m, "Model")
        .def(nb::new_(&make_model), nb::arg("shape"), nb::arg("layers"), nb::arg("ropes"), nb::arg("embedding"), nb::arg("head"),
             nb::arg("threads"), nb::arg("byte_activations"), nb::arg("float_prompts"), nb::arg("cache"), nb::arg("path"))
        .def("sequence", &make_text, nb::rv_policy::take_ownership)
        .def("forward", &model_forward, nb::arg("sequence"), nb::arg("tokens").noconvert(), nb::arg("to").noconvert())
        .def("step", &model_step, nb::arg("sequence"), nb::arg("tokens").noconvert(), nb::arg("how"), nb::arg("random"))
        .def("take_times", &model_times)
        .def_prop_ro("path", [](const Model &x) { return x.decoder->path(); })
        .def_prop_ro("threads", [](const Model &x) { return x.decoder->threads(); })
        .def_prop_ro("inputs", [](const Model &x) { return x.decoder->inputs(); })
        .def_prop_ro("inputs_apart", [](const Model &x) { return x.decoder->inputs_apart(); })
        .def_prop_ro("cache_bytes_per_position", [](const Model &x) { return x.decoder->cache_bytes_per_position(); });
}

}  // namespace bitpress
