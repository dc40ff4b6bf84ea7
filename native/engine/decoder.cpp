#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace bitpress {

namespace {

std::atomic<uint64_t> decoders{0};

}  // namespace

const char *const Decoder::part_names[PARTS] = {"norms", "products", "attention", "gates", "head"};

std::vector<double> Decoder::take_times() {
    std::vector<double> times(times_, times_ + PARTS);
    std::fill(times_, times_ + PARTS, 0.0);
    return times;
}

Decoder::Decoder(DecoderShape shape, Program program, std::vector<Rope> ropes, const Linear *embedding, const Linear *head,
                 const DecoderOptions &options)
    : serial_(++decoders), kernels_(choose_kernels(options.path)), cache_(choose_cache(kernels_, options.cache)),
      shape_(std::move(shape)), program_(std::move(program)), ropes_(std::move(ropes)), embedding_(embedding), head_(head),
      byte_activations_(options.byte_activations),
      byte_prompts_(options.byte_activations && (!options.float_prompts || kernels_.half_product != nullptr)), pool_(options.threads),
      scratch_(size_t(options.threads)) {
    mark_meetings(program_);
    for (const Rope &rope : ropes_) {
        std::vector<float> cosines, sines;
        const size_t pairs = rope.frequencies.size();
        cosines.reserve(pairs * shape_.context), sines.reserve(pairs * shape_.context);
        for (int position = 0; position < shape_.context; ++position) {
            for (float frequency : rope.frequencies) {
                const double angle = frequency * float(position);  // in float, as it is everywhere
                cosines.push_back(float(std::cos(angle)) * rope.factor);
                sines.push_back(float(std::sin(angle)) * rope.factor);
            }
        }
        cosines_.push_back(std::move(cosines)), sines_.push_back(std::move(sines));
    }
    shared_.outputs.resize(program_.outputs.size());
    for (int i = 0; i <= options.threads; ++i) {
        rows_.emplace_back(new Rows);
        rows_.back()->inputs.resize(size_t(program_.inputs));
    }
}

const float *Decoder::forward(Sequence &sequence, const int32_t *tokens, int count, bool all_logits) {
    const bool alone = count == 1;
    sequence.reserve(count);
    make_room(sequence.length(), count, all_logits);
    overflowed_ = false;
    pool_.run([&](int thread) {
        const int threads = pool_.threads();
        const int from = alone ? 0 : int(int64_t(count) * thread / threads);
        const int to = alone ? 1 : int(int64_t(count) * (thread + 1) / threads);
        Rows &own = *rows_[alone ? size_t(thread) : rows_.size() - 1];
        Turn turn{thread, count, alone, from, to, own, sequence, std::chrono::steady_clock::now()};
        run(turn, tokens, all_logits);
    });
    // Rounding to bytes would turn what is no number into some number: nothing after it could tell.
    if (overflowed_) throw std::overflow_error("values beyond the range of the cache or of float32");
    sequence.append(tokens, count);
    return shared_.logits.data();
}

void Decoder::make_room(int length, int count, bool all_logits) {
    Shared &s = shared_;
    const size_t rows = size_t(count), q = size_t(shape_.heads) * shape_.head, kv = size_t(shape_.kv_heads) * shape_.head;
    const size_t inner = size_t(program_.inner);
    for (size_t i = 0; i < s.outputs.size(); ++i) s.outputs[i].resize(rows * program_.outputs[i]);
    s.attended.resize(rows * q);
    s.gates.resize(rows * inner), s.ups.resize(rows * inner), s.acted.resize(rows * inner);
    s.logits.resize((all_logits ? rows : 1) * shape_.vocabulary);
    const size_t parts = size_t(length / CHUNK_POSITIONS + 1) * shape_.heads;
    s.tops.resize(parts), s.sums.resize(parts), s.parts.resize(parts * shape_.head);
    if (tiles(count)) {
        const size_t blocks = (size_t(length) + rows + 31) / 32 + 1;
        s.key_tiles.resize(blocks * 32 * kv), s.value_tiles.resize(blocks * 32 * kv);
    }
    const bool alone = count == 1;
    for (size_t i = alone ? 0 : rows_.size() - 1; i < (alone ? rows_.size() - 1 : rows_.size()); ++i) {
        rows_[i]->hidden.resize(rows * shape_.hidden), rows_[i]->normed.resize(std::max({inner, q, rows * shape_.hidden}));
    }
}

void Decoder::run(Turn &turn, const int32_t *tokens, bool all_logits) {
    embed(turn, tokens);
    for (const Layer &layer : program_.layers) {
        begin(turn, layer);
        for (const Step &step : layer.steps) std::visit([&](const auto &each) { take(turn, each); }, step);
        end(turn);
    }
    multiply_head(turn, all_logits);
}

void Decoder::embed(const Turn &turn, const int32_t *tokens) const {
    for (int row = turn.from; row < turn.to; ++row) {
        float *h = turn.own.hidden.data() + size_t(row) * shape_.hidden;
        embedding_->row(tokens[row], h);
        if (shape_.embedding_scale != 1.0f) kernels_.scale(shape_.embedding_scale, shape_.hidden, h);
    }
}

void Decoder::begin(Turn &turn, const Layer &layer) {
    if (turn.alone || turn.thread == 0) {
        for (size_t i = 0; i < layer.readers.size(); ++i) {
            if (!layer.readers[i].empty()) turn.own.inputs[i].plan(kernels_, layer.readers[i], turn.count, bytes(turn.count));
        }
    }
    meet(turn);
}

void Decoder::take(Turn &turn, const Norm &step) {
    Input &to = turn.own.inputs[size_t(step.to)];
    for (int row = turn.from; row < turn.to; ++row) prepare(to, normed(turn, step.weight, row), row);
    lap(turn, NORMS);
}

void Decoder::take(Turn &turn, const Multiply &step) {
    const Input &input = turn.own.inputs[size_t(step.of)];
    std::vector<Product> products;
    products.reserve(step.linears.size());
    for (size_t i = 0; i < step.linears.size(); ++i) {
        products.push_back({step.linears[i], shared_.outputs[size_t(step.to[i])].data(), step.linears[i]->rows});
    }
    if (!turn.alone || step.meets) pool_.wait();
    multiply(kernels_, pool_, turn.thread, products, input, scratch_[size_t(turn.thread)]);
    pool_.wait();
    map_outputs(kernels_, pool_, turn.thread, products, turn.count);
    note_apart(turn, input);
    lap(turn, PRODUCTS);
}

void Decoder::take(Turn &turn, const Gate &step) {
    Shared &s = shared_;
    Scratch &scratch = scratch_[size_t(turn.thread)];
    const Input &input = turn.own.inputs[size_t(step.of)];
    const int inner = step.gate->rows;
    const bool tiled = byte_prompts_ || (step.gate->rounding && step.up->rounding);
    const bool at_once = turn.count > MOST_ROWS && tiled && !step.gate->out_map && !step.up->out_map;
    const std::vector<Product> products{{step.gate, s.gates.data(), inner}, {step.up, s.ups.data(), inner}};
    if (!turn.alone || step.meets) pool_.wait();
    if (at_once) multiply_gated(kernels_, pool_, turn.thread, {step.gate, step.up, s.acted.data(), inner, shape_.tanh_gelu}, input, scratch);
    else multiply(kernels_, pool_, turn.thread, products, input, scratch);
    pool_.wait();
    if (!at_once) map_outputs(kernels_, pool_, turn.thread, products, turn.count);
    note_apart(turn, input);
    for (int row = turn.from; row < turn.to; ++row) {
        const size_t at = size_t(row) * inner;
        float *acted = turn.alone ? turn.own.normed.data() : s.acted.data() + at;
        if (!at_once) kernels_.gate(s.gates.data() + at, s.ups.data() + at, inner, shape_.tanh_gelu, acted);
        check_finite(acted, inner);
        prepare(turn.own.inputs[size_t(step.to)], acted, row);
    }
    lap(turn, GATES);
}

void Decoder::take(Turn &turn, const Add &step) {
    const int hidden = shape_.hidden;
    for (int row = turn.from; row < turn.to; ++row) {
        const float *add = shared_.outputs[size_t(step.of)].data() + size_t(row) * hidden;
        if (!step.norm.empty()) {
            float *to = turn.own.normed.data() + size_t(row) * hidden;
            kernels_.norm(add, step.norm.data(), hidden, shape_.eps, to);
            add = to;
        }
        kernels_.add(add, hidden, turn.own.hidden.data() + size_t(row) * hidden);
    }
    lap(turn, NORMS);
}

void Decoder::end(Turn &turn) {
    for (int row = turn.from; row < turn.to; ++row) check_finite(turn.own.hidden.data() + size_t(row) * shape_.hidden, shape_.hidden);
}

// Of the last row alone, every thread for itself, or of all rows together.
void Decoder::multiply_head(Turn &turn, bool all_logits) {
    const std::vector<Product> products{{head_, shared_.logits.data(), shape_.vocabulary}};
    Scratch &scratch = scratch_[size_t(turn.thread)];
    if (all_logits && !turn.alone) {
        if (turn.thread == 0) turn.own.to_head.plan(kernels_, {head_}, turn.count, bytes(turn.count));
        meet(turn);
        for (int row = turn.from; row < turn.to; ++row) prepare(turn.own.to_head, normed(turn, shape_.final_norm, row), row);
        meet(turn);
        multiply(kernels_, pool_, turn.thread, products, turn.own.to_head, scratch);
        pool_.wait();
        map_outputs(kernels_, pool_, turn.thread, products, turn.count);
    } else {
        meet(turn);
        Rows &mine = *rows_[size_t(turn.thread)];
        const float *last = turn.own.hidden.data() + size_t(turn.count - 1) * shape_.hidden;
        mine.normed.resize(size_t(shape_.hidden));
        kernels_.norm(last, shape_.final_norm.data(), shape_.hidden, shape_.eps, mine.normed.data());
        mine.to_head.plan(kernels_, {head_}, 1, bytes(1));
        prepare(mine.to_head, mine.normed.data(), 0);
        multiply(kernels_, pool_, turn.thread, products, mine.to_head, scratch);
        pool_.wait();
        map_outputs(kernels_, pool_, turn.thread, products, 1);
    }
    lap(turn, HEAD);
}

const float *Decoder::normed(const Turn &turn, const std::vector<float> &norm, int row) {
    const size_t at = size_t(row) * shape_.hidden;
    float *to = turn.own.normed.data() + at;
    kernels_.norm(turn.own.hidden.data() + at, norm.data(), shape_.hidden, shape_.eps, to);
    check_finite(to, shape_.hidden);
    return to;
}

void Decoder::check_finite(const float *x, int count) {
    uint32_t found = 0;
    for (int i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        found |= uint32_t((bits & 0x7f800000) == 0x7f800000);
    }
    if (found != 0) overflowed_ = true;
}

void Decoder::lap(Turn &turn, TimedPart part) {
    if (turn.thread != 0) return;
    const auto now = std::chrono::steady_clock::now();
    times_[part] += std::chrono::duration<double>(now - turn.clock).count();
    turn.clock = now;
}

void Decoder::note_apart(const Turn &turn, const Input &input) {
    if (turn.thread == 0) inputs_ += input.values(), inputs_apart_ += input.apart();
}

}  // namespace bitpress
