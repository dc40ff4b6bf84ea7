#include "decoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

namespace bitpress {

// The residual stream and the inputs of products. A single token's are small: every thread keeps its own and computes them anew, so
// that threads meet only around products. Of many tokens they are shared, each thread fills its own rows, and all meet once more.
struct Decoder::Rows {
    Aligned<float> hidden, normed;
    Input to_qkv, to_o, to_mlp, to_down, to_head;
};

struct Decoder::Shared {
    Aligned<float> q, k, v, attended, o, gates, ups, down, logits, acted;
    // partial attention of one token: [kv head][chunk][query head of the group]
    Aligned<float> tops, sums, parts;
    int chunks = 0;
    // the cache of one layer as tiles: [kv head][position, in blocks of 32]
    Aligned<uint16_t> key_tiles, value_tiles;
};

const char *const Decoder::part_names[PARTS] = {"norm", "qkv", "attention", "o", "gate and up", "activation", "down", "head"};

std::vector<double> Decoder::take_times() {
    std::vector<double> times(times_, times_ + PARTS);
    std::fill(times_, times_ + PARTS, 0.0);
    return times;
}

Decoder::Decoder(DecoderShape shape, std::vector<LayerWeights> layers, std::vector<Rope> ropes, const Linear *embedding,
                 const Linear *head, int threads, bool byte_activations, bool float_prompts, bool byte_cache, const char *path)
    : kernels_(choose_kernels(path)), shape_(std::move(shape)), layers_(std::move(layers)), ropes_(std::move(ropes)),
      embedding_(embedding), head_(head), byte_activations_(byte_activations),
      byte_prompts_(byte_activations && (!float_prompts || kernels_.half_product != nullptr)), byte_cache_(byte_cache), pool_(threads),
      shared_(new Shared), scratch_(size_t(threads)) {
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
    for (int i = 0; i <= threads; ++i) rows_.emplace_back(new Rows);
    const size_t positions = cache_positions();
    const size_t element = byte_cache_ ? 1 : 2;
    const size_t matrix = (positions * shape_.head * element + 63) / 64 * 64;
    head_bytes_ = 2 * matrix + (byte_cache_ ? 2 * positions * sizeof(float) : 0);
    head_bytes_ = (head_bytes_ + 63) / 64 * 64;
    layer_bytes_ = head_bytes_ * shape_.kv_heads;
    cache_size_ = layer_bytes_ * layers_.size();
    cache_memory_ = mmap(nullptr, cache_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cache_memory_ == MAP_FAILED) throw std::bad_alloc();
}

Decoder::~Decoder() { munmap(cache_memory_, cache_size_); }

size_t Decoder::cache_bytes_per_position() const {
    return layers_.size() * shape_.kv_heads * 2 * (size_t(shape_.head) * (byte_cache_ ? 1 : 2) + (byte_cache_ ? 4 : 0));
}

CacheView Decoder::cache(int layer, int kv_head) const {
    const size_t positions = cache_positions();
    const size_t matrix = (positions * shape_.head * (byte_cache_ ? 1 : 2) + 63) / 64 * 64;
    uint8_t *base = static_cast<uint8_t *>(cache_memory_) + layer * layer_bytes_ + kv_head * head_bytes_;
    CacheView view;
    view.bytes = byte_cache_;
    view.head = shape_.head;
    view.keys = base;
    view.values = base + matrix;
    if (byte_cache_) {
        view.key_scales = reinterpret_cast<float *>(base + 2 * matrix);
        view.value_scales = view.key_scales + positions;
    }
    return view;
}

const float *Decoder::forward(const int32_t *tokens, int count, bool all_logits) {
    Shared &s = *shared_;
    const size_t rows = size_t(count), q = size_t(shape_.heads) * shape_.head, kv = size_t(shape_.kv_heads) * shape_.head;
    const size_t inner = size_t(layers_.empty() ? 0 : layers_[0].gate->rows);
    s.q.resize(rows * q), s.k.resize(rows * kv), s.v.resize(rows * kv), s.attended.resize(rows * q);
    s.o.resize(rows * shape_.hidden), s.down.resize(rows * shape_.hidden);
    s.gates.resize(rows * inner), s.ups.resize(rows * inner), s.acted.resize(rows * inner);
    s.logits.resize((all_logits ? rows : 1) * shape_.vocabulary);
    s.chunks = length_ / CHUNK_POSITIONS + 1;
    const size_t parts = size_t(s.chunks) * shape_.heads;
    s.tops.resize(parts), s.sums.resize(parts), s.parts.resize(parts * shape_.head);
    const bool alone = count == 1;
    if (tiles(count)) {
        const size_t blocks = (size_t(length_) + rows + 31) / 32 + 1;
        s.key_tiles.resize(blocks * 32 * kv), s.value_tiles.resize(blocks * 32 * kv);
    }
    for (size_t i = alone ? 0 : rows_.size() - 1; i < (alone ? rows_.size() - 1 : rows_.size()); ++i) {
        rows_[i]->hidden.resize(rows * shape_.hidden), rows_[i]->normed.resize(std::max({inner, q, rows * shape_.hidden}));
    }
    overflowed_ = false;
    pool_.run([&](int thread) { run(thread, *rows_[alone ? size_t(thread) : rows_.size() - 1], tokens, count, all_logits); });
    // Rounding to bytes would turn what is no number into some number: nothing after it could tell.
    if (overflowed_) throw std::overflow_error("values beyond the range of the cache or of float32");
    length_ += count;
    return s.logits.data();
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

void Decoder::rotate(const LayerWeights &l, float *x, const std::vector<float> &norm, int position) const {
    if (!norm.empty()) kernels_.norm(x, norm.data(), shape_.head, shape_.eps, x);
    if (l.rope < 0) return;
    const size_t pairs = ropes_[l.rope].frequencies.size();
    kernels_.rotate(x, cosines_[l.rope].data() + position * pairs, sines_[l.rope].data() + position * pairs, int(pairs));
}

void Decoder::run(int thread, Rows &own, const int32_t *tokens, int count, bool all_logits) {
    Shared &s = *shared_;
    const bool alone = count == 1, plans = alone || thread == 0;
    const int threads = pool_.threads(), hidden = shape_.hidden, group = shape_.heads / shape_.kv_heads, head = shape_.head;
    const int from = alone ? 0 : int(int64_t(count) * thread / threads), to = alone ? 1 : int(int64_t(count) * (thread + 1) / threads);
    auto clock = std::chrono::steady_clock::now();
    auto lap = [&](int part) {
        if (thread != 0) return;
        const auto now = std::chrono::steady_clock::now();
        times_[part] += std::chrono::duration<double>(now - clock).count();
        clock = now;
    };
    auto note_apart = [&](const Input &input) {
        if (thread == 0) inputs_ += input.values(), inputs_apart_ += input.apart();
    };
    // Meets the others where rows are shared: those of a single token are everybody's own.
    auto meet = [&] {
        if (!alone) pool_.wait();
    };
    auto plan = [&](Input &input, const std::vector<const Linear *> &linears, int rows) {
        if (plans) input.plan(kernels_, linears, rows, bytes(rows));
    };
    auto add_to_stream = [&](const float *x, const std::vector<float> &norm, int row) {
        float *h = own.hidden.data() + size_t(row) * hidden;
        const float *add = x + size_t(row) * hidden;
        if (!norm.empty()) {
            float *normed = own.normed.data() + size_t(alone ? 0 : row) * hidden;
            kernels_.norm(add, norm.data(), hidden, shape_.eps, normed);
            add = normed;
        }
        kernels_.add(add, hidden, h);
    };
    auto normed = [&](const std::vector<float> &norm, int row) -> const float * {
        float *to_write = own.normed.data() + size_t(alone ? 0 : row) * hidden;
        kernels_.norm(own.hidden.data() + size_t(row) * hidden, norm.data(), hidden, shape_.eps, to_write);
        check_finite(to_write, hidden);
        return to_write;
    };

    for (int row = from; row < to; ++row) {
        float *h = own.hidden.data() + size_t(row) * hidden;
        embedding_->row(tokens[row], h);
        if (shape_.embedding_scale != 1.0f) kernels_.scale(shape_.embedding_scale, hidden, h);
    }
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        const LayerWeights &l = layers_[layer];
        plan(own.to_qkv, {l.q, l.k, l.v}, count);
        plan(own.to_o, {l.o}, count);
        plan(own.to_mlp, {l.gate, l.up}, count);
        plan(own.to_down, {l.down}, count);
        meet();
        for (int row = from; row < to; ++row) own.to_qkv.prepare(kernels_, normed(l.input_norm, row), row);
        meet();
        lap(0);
        const int q = shape_.heads * head, kv = shape_.kv_heads * head;
        multiply(kernels_, pool_, thread, {{l.q, s.q.data(), q}, {l.k, s.k.data(), kv}, {l.v, s.v.data(), kv}}, own.to_qkv, scratch_[thread]);
        pool_.wait();
        note_apart(own.to_qkv);
        lap(1);
        if (alone) {
            // Pieces of 256 positions of one key-value head; the piece with the newest position also writes it.
            const int first = l.window > 0 ? std::max(0, length_ + 1 - l.window) : 0;
            const int first_chunk = first / CHUNK_POSITIONS, chunks = length_ / CHUNK_POSITIONS + 1 - first_chunk;
            const int total = shape_.kv_heads * chunks;
            std::vector<float> &queries = scratch_[thread].queries;
            queries.resize(size_t(group) * head);
            for (int item = pool_.first_piece(thread, total, 1); item < total; item = pool_.next_piece(total, 1)) {
                const int kv_head = item / chunks, chunk = item % chunks;
                const CacheView view = cache(int(layer), kv_head);
                if (chunk == chunks - 1) {
                    float *key = s.k.data() + kv_head * head;
                    rotate(l, key, l.k_norm, length_);
                    kernels_.remember(view, length_, key, s.v.data() + kv_head * head);
                }
                for (int g = 0; g < group; ++g) {
                    float *query = queries.data() + g * head;
                    std::memcpy(query, s.q.data() + (kv_head * group + g) * head, size_t(head) * sizeof(float));
                    rotate(l, query, l.q_norm, length_);
                    for (int d = 0; d < head; ++d) query[d] *= shape_.attention_scale;
                }
                const int begin = std::max(first, (first_chunk + chunk) * CHUNK_POSITIONS);
                const int end = std::min(length_ + 1, (first_chunk + chunk + 1) * CHUNK_POSITIONS);
                const size_t at = (size_t(kv_head) * chunks + chunk) * group;
                kernels_.attend(view, begin, end, queries.data(), group, s.tops.data() + at, s.sums.data() + at,
                                s.parts.data() + at * head);
            }
            pool_.wait();
            float *attended = own.normed.data();  // large enough: see forward
            merge(chunks, attended);
            check_finite(attended, shape_.heads * head);
            own.to_o.prepare(kernels_, attended, 0);
        } else {
            for (int row = from; row < to; ++row) {
                for (int h = 0; h < shape_.kv_heads; ++h) {
                    float *key = s.k.data() + size_t(row) * kv + h * head;
                    rotate(l, key, l.k_norm, length_ + row);
                    kernels_.remember(cache(int(layer), h), length_ + row, key, s.v.data() + size_t(row) * kv + h * head);
                }
                for (int h = 0; h < shape_.heads; ++h) {
                    float *query = s.q.data() + size_t(row) * q + h * head;
                    rotate(l, query, l.q_norm, length_ + row);
                    for (int d = 0; d < head; ++d) query[d] *= shape_.attention_scale;
                }
            }
            pool_.wait();
            if (tiles(count)) attend_blocks(thread, int(layer), count);
            else attend_rows(thread, int(layer), count);
            pool_.wait();
            for (int row = from; row < to; ++row) {
                check_finite(s.attended.data() + size_t(row) * q, q);
                own.to_o.prepare(kernels_, s.attended.data() + size_t(row) * q, row);
            }
            pool_.wait();
        }
        lap(2);
        multiply(kernels_, pool_, thread, {{l.o, s.o.data(), hidden}}, own.to_o, scratch_[thread]);
        pool_.wait();
        note_apart(own.to_o);
        lap(3);
        for (int row = from; row < to; ++row) {
            add_to_stream(s.o.data(), l.attention_out_norm, row);
            own.to_mlp.prepare(kernels_, normed(l.mlp_norm, row), row);
        }
        meet();
        lap(0);
        const int inner = l.gate->rows;
        const bool gated = count > MOST_ROWS && byte_prompts_;
        if (gated) multiply_gated(kernels_, pool_, thread, {l.gate, l.up, s.acted.data(), inner, shape_.tanh_gelu}, own.to_mlp, scratch_[thread]);
        else multiply(kernels_, pool_, thread, {{l.gate, s.gates.data(), inner}, {l.up, s.ups.data(), inner}}, own.to_mlp, scratch_[thread]);
        pool_.wait();
        note_apart(own.to_mlp);
        lap(4);
        for (int row = from; row < to; ++row) {
            float *acted = alone ? own.normed.data() : s.acted.data() + size_t(row) * inner;
            if (!gated) kernels_.gate(s.gates.data() + size_t(row) * inner, s.ups.data() + size_t(row) * inner, inner, shape_.tanh_gelu, acted);
            check_finite(acted, inner);
            own.to_down.prepare(kernels_, acted, row);
        }
        meet();
        lap(5);
        multiply(kernels_, pool_, thread, {{l.down, s.down.data(), hidden}}, own.to_down, scratch_[thread]);
        pool_.wait();
        note_apart(own.to_down);
        lap(6);
        for (int row = from; row < to; ++row) {
            add_to_stream(s.down.data(), l.mlp_out_norm, row);
            check_finite(own.hidden.data() + size_t(row) * hidden, hidden);
        }
    }
    // The head: of the last row alone, every thread for itself, or of all rows together.
    if (all_logits && !alone) {
        plan(own.to_head, {head_}, count);
        meet();
        for (int row = from; row < to; ++row) own.to_head.prepare(kernels_, normed(shape_.final_norm, row), row);
        meet();
        multiply(kernels_, pool_, thread, {{head_, s.logits.data(), shape_.vocabulary}}, own.to_head, scratch_[thread]);
    } else {
        meet();
        Rows &mine = *rows_[size_t(thread)];
        mine.normed.resize(size_t(hidden));
        kernels_.norm(own.hidden.data() + size_t(count - 1) * hidden, shape_.final_norm.data(), hidden, shape_.eps, mine.normed.data());
        mine.to_head.plan(kernels_, {head_}, 1, bytes(1));
        mine.to_head.prepare(kernels_, mine.normed.data(), 0);
        multiply(kernels_, pool_, thread, {{head_, s.logits.data(), shape_.vocabulary}}, mine.to_head, scratch_[thread]);
    }
    pool_.wait();
    lap(7);
}

// Puts the pieces of a single token's attention together: [heads * head].
void Decoder::merge(int chunks, float *to) const {
    const Shared &s = *shared_;
    const int group = shape_.heads / shape_.kv_heads, head = shape_.head;
    for (int h = 0; h < shape_.heads; ++h) {
        const size_t base = size_t(h / group) * chunks * group + h % group;
        float top = s.tops[base];
        for (int c = 1; c < chunks; ++c) top = std::max(top, s.tops[base + size_t(c) * group]);
        float total = 0;
        float *out = to + size_t(h) * head;
        std::memset(out, 0, size_t(head) * sizeof(float));
        for (int c = 0; c < chunks; ++c) {
            const size_t at = base + size_t(c) * group;
            const float factor = std::exp(s.tops[at] - top);
            total += factor * s.sums[at];
            for (int d = 0; d < head; ++d) out[d] += factor * s.parts[at * head + d];
        }
        const float inverse = 1.0f / total;
        for (int d = 0; d < head; ++d) out[d] *= inverse;
    }
}

bool Decoder::tiles(int count) const {
    return kernels_.attend_tiles != nullptr && byte_prompts_ && count > MOST_ROWS && shape_.head % 32 == 0;
}

// Attention of many rows on tiles: the cache is laid out once, then a piece of work is 32 rows of one query head.
void Decoder::attend_blocks(int thread, int layer, int count) {
    Scratch &scratch = scratch_[thread];
    Shared &s = *shared_;
    const int group = shape_.heads / shape_.kv_heads, head = shape_.head, q = shape_.heads * head, length = length_ + count;
    const int window = layers_[layer].window;
    const int oldest = window > 0 ? std::max(0, length_ + 1 - window) / 32 : 0, blocks = (length + 31) / 32, fresh = blocks - oldest;
    const size_t plane = s.key_tiles.size() / shape_.kv_heads;
    const int pieces = (fresh + 3) / 4, cached = pieces * shape_.kv_heads;
    for (int item = pool_.first_piece(thread, cached, 1); item < cached; item = pool_.next_piece(cached, 1)) {
        const int kv_head = item / pieces, from = oldest + item % pieces * 4;
        kernels_.tile_cache(cache(layer, kv_head), from, std::min(blocks, from + 4), length, s.key_tiles.data() + kv_head * plane,
                            s.value_tiles.data() + kv_head * plane);
    }
    pool_.wait();
    scratch.attention.resize(tile_scratch(head));
    const int row_blocks = (count + 31) / 32, total = row_blocks * shape_.heads;
    for (int item = pool_.first_piece(thread, total, 1); item < total; item = pool_.next_piece(total, 1)) {
        // The last rows see most positions: they come first, so that the threads end together.
        const int h = item % shape_.heads, row = (row_blocks - 1 - item / shape_.heads) * 32;
        const size_t at = size_t(row) * q + size_t(h) * head;
        kernels_.attend_tiles(head, s.key_tiles.data() + h / group * plane, s.value_tiles.data() + h / group * plane, length_ + row,
                              std::min(32, count - row), window, s.q.data() + at, q, s.attended.data() + at, scratch.attention.data());
    }
}

// Attention of many rows: a piece of work is one row and one key-value head.
void Decoder::attend_rows(int thread, int layer, int count) {
    Scratch &scratch = scratch_[thread];
    Shared &s = *shared_;
    const LayerWeights &l = layers_[layer];
    const int group = shape_.heads / shape_.kv_heads, head = shape_.head, q = shape_.heads * head;
    const int total = count * shape_.kv_heads;
    scratch.queries.resize(size_t(group) * (head + 2));
    float *part = scratch.queries.data(), *tops = part + size_t(group) * head, *sums = tops + group;
    std::vector<float> best(group), weights(group);
    for (int at = pool_.first_piece(thread, total, 8); at < total; at = pool_.next_piece(total, 8)) {
        for (int item = at; item < std::min(total, at + 8); ++item) {
            const int kv_head = item / count, row = item % count, position = length_ + row;
            const CacheView view = cache(layer, kv_head);
            const float *queries = s.q.data() + size_t(row) * q + size_t(kv_head) * group * head;
            float *out = s.attended.data() + size_t(row) * q + size_t(kv_head) * group * head;
            const int first = l.window > 0 ? std::max(0, position + 1 - l.window) : 0;
            std::memset(out, 0, size_t(group) * head * sizeof(float));
            for (int g = 0; g < group; ++g) best[g] = -1e30f, weights[g] = 0;
            for (int chunk = first / CHUNK_POSITIONS; chunk <= position / CHUNK_POSITIONS; ++chunk) {
                kernels_.attend(view, std::max(first, chunk * CHUNK_POSITIONS),
                                std::min(position + 1, (chunk + 1) * CHUNK_POSITIONS), queries, group, tops, sums, part);
                for (int g = 0; g < group; ++g) {
                    const float top = std::max(best[g], tops[g]), old = std::exp(best[g] - top), fresh = std::exp(tops[g] - top);
                    best[g] = top;
                    weights[g] = weights[g] * old + sums[g] * fresh;
                    for (int d = 0; d < head; ++d) out[g * head + d] = out[g * head + d] * old + part[g * head + d] * fresh;
                }
            }
            for (int g = 0; g < group; ++g) {
                const float inverse = 1.0f / weights[g];
                for (int d = 0; d < head; ++d) out[g * head + d] *= inverse;
            }
        }
    }
}

}  // namespace bitpress
