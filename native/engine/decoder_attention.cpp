// The step of attention: of a single token in pieces of the cache, of many rows by row or on tiles.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"

namespace bitpress {

void Decoder::take(Turn &turn, const Attend &step) {
    Input &to = turn.own.inputs[size_t(step.to)];
    const int q = shape_.heads * shape_.head;
    if (turn.alone) {
        attend_one(turn, step);
        check_finite(turn.own.normed.data(), q);
        prepare(to, turn.own.normed.data(), 0);
    } else {
        remember_rows(turn, step);
        pool_.wait();
        if (tiles(turn.count)) attend_blocks(turn, step);
        else attend_rows(turn, step);
        pool_.wait();
        for (int row = turn.from; row < turn.to; ++row) {
            check_finite(shared_.attended.data() + size_t(row) * q, q);
            prepare(to, shared_.attended.data() + size_t(row) * q, row);
        }
    }
    lap(turn, ATTENTION);
}

void Decoder::rotate(float *x, int rope, const std::vector<float> &norm, int position) const {
    if (!norm.empty()) kernels_.norm(x, norm.data(), shape_.head, shape_.eps, x);
    if (rope < 0) return;
    const size_t pairs = ropes_[size_t(rope)].frequencies.size(), at = size_t(position) * pairs;
    kernels_.rotate(x, cosines_[size_t(rope)].data() + at, sines_[size_t(rope)].data() + at, int(pairs));
}

// Pieces of 256 positions of one key-value head; the piece with the newest position also writes it. Leaves the result in own.normed.
void Decoder::attend_one(const Turn &turn, const Attend &step) {
    Shared &s = shared_;
    const int group = shape_.heads / shape_.kv_heads, head = shape_.head, length = turn.sequence.length();
    const float *q = s.outputs[size_t(step.queries)].data(), *v = s.outputs[size_t(step.values)].data();
    float *k = s.outputs[size_t(step.keys)].data();
    const int first = step.window > 0 ? std::max(0, length + 1 - step.window) : 0;
    const int first_chunk = first / CHUNK_POSITIONS, chunks = length / CHUNK_POSITIONS + 1 - first_chunk;
    const int total = shape_.kv_heads * chunks;
    std::vector<float> &queries = scratch_[size_t(turn.thread)].queries;
    queries.resize(size_t(group) * head);
    for (int item = pool_.first_piece(turn.thread, total, 1); item < total; item = pool_.next_piece(total, 1)) {
        const int kv_head = item / chunks, chunk = item % chunks;
        const CacheView view = turn.sequence.view(step.cache, kv_head);
        if (chunk == chunks - 1) {
            float *key = k + kv_head * head;
            rotate(key, step.rope, step.k_norm, length);
            cache_.write(view, length, key, v + kv_head * head);
        }
        for (int g = 0; g < group; ++g) {
            float *query = queries.data() + g * head;
            std::memcpy(query, q + (kv_head * group + g) * head, size_t(head) * sizeof(float));
            rotate(query, step.rope, step.q_norm, length);
            for (int d = 0; d < head; ++d) query[d] *= shape_.attention_scale;
        }
        const int begin = std::max(first, (first_chunk + chunk) * CHUNK_POSITIONS);
        const int end = std::min(length + 1, (first_chunk + chunk + 1) * CHUNK_POSITIONS);
        const size_t at = (size_t(kv_head) * chunks + chunk) * group;
        kernels_.attend(cache_, view, begin, end, queries.data(), group, s.tops.data() + at, s.sums.data() + at, s.parts.data() + at * head);
    }
    pool_.wait();
    merge(chunks, turn.own.normed.data());  // large enough: see make_room
}

// Puts the pieces of a single token's attention together: [heads * head].
void Decoder::merge(int chunks, float *to) const {
    const Shared &s = shared_;
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

void Decoder::remember_rows(const Turn &turn, const Attend &step) {
    Shared &s = shared_;
    const int head = shape_.head, q = shape_.heads * head, kv = shape_.kv_heads * head, length = turn.sequence.length();
    for (int row = turn.from; row < turn.to; ++row) {
        for (int h = 0; h < shape_.kv_heads; ++h) {
            const size_t at = size_t(row) * kv + h * head;
            float *key = s.outputs[size_t(step.keys)].data() + at;
            rotate(key, step.rope, step.k_norm, length + row);
            cache_.write(turn.sequence.view(step.cache, h), length + row, key, s.outputs[size_t(step.values)].data() + at);
        }
        for (int h = 0; h < shape_.heads; ++h) {
            float *query = s.outputs[size_t(step.queries)].data() + size_t(row) * q + h * head;
            rotate(query, step.rope, step.q_norm, length + row);
            for (int d = 0; d < head; ++d) query[d] *= shape_.attention_scale;
        }
    }
}

bool Decoder::tiles(int count) const {
    return kernels_.attend_tiles != nullptr && cache_.tile != nullptr && byte_prompts_ && count > MOST_ROWS && shape_.head % 32 == 0;
}

// Attention of many rows on tiles: the cache is laid out once, then a piece of work is 32 rows of one query head.
void Decoder::attend_blocks(const Turn &turn, const Attend &step) {
    Scratch &scratch = scratch_[size_t(turn.thread)];
    Shared &s = shared_;
    const int count = turn.count, before = turn.sequence.length(), length = before + count;
    const int group = shape_.heads / shape_.kv_heads, head = shape_.head, q = shape_.heads * head;
    const int oldest = step.window > 0 ? std::max(0, before + 1 - step.window) / 32 : 0, blocks = (length + 31) / 32;
    const size_t plane = s.key_tiles.size() / shape_.kv_heads;
    const int pieces = (blocks - oldest + 3) / 4, cached = pieces * shape_.kv_heads;
    for (int item = pool_.first_piece(turn.thread, cached, 1); item < cached; item = pool_.next_piece(cached, 1)) {
        const int kv_head = item / pieces, from = oldest + item % pieces * 4;
        cache_.tile(turn.sequence.view(step.cache, kv_head), from, std::min(blocks, from + 4), length,
                    s.key_tiles.data() + kv_head * plane, s.value_tiles.data() + kv_head * plane);
    }
    pool_.wait();
    scratch.attention.resize(tile_scratch(head));
    const int row_blocks = (count + 31) / 32, total = row_blocks * shape_.heads;
    for (int item = pool_.first_piece(turn.thread, total, 1); item < total; item = pool_.next_piece(total, 1)) {
        // The last rows see most positions: they come first, so that the threads end together.
        const int h = item % shape_.heads, row = (row_blocks - 1 - item / shape_.heads) * 32;
        const size_t at = size_t(row) * q + size_t(h) * head;
        kernels_.attend_tiles(head, s.key_tiles.data() + h / group * plane, s.value_tiles.data() + h / group * plane, before + row,
                              std::min(32, count - row), step.window, s.outputs[size_t(step.queries)].data() + at, q,
                              s.attended.data() + at, scratch.attention.data());
    }
}

// Attention of many rows: a piece of work is one row and one key-value head.
void Decoder::attend_rows(const Turn &turn, const Attend &step) {
    Scratch &scratch = scratch_[size_t(turn.thread)];
    Shared &s = shared_;
    const int group = shape_.heads / shape_.kv_heads, head = shape_.head, q = shape_.heads * head;
    const int count = turn.count, total = count * shape_.kv_heads;
    scratch.queries.resize(size_t(group) * (head + 2));
    float *part = scratch.queries.data(), *tops = part + size_t(group) * head, *sums = tops + group;
    std::vector<float> best(group), weights(group);
    for (int at = pool_.first_piece(turn.thread, total, 8); at < total; at = pool_.next_piece(total, 8)) {
        for (int item = at; item < std::min(total, at + 8); ++item) {
            const int kv_head = item / count, row = item % count, position = turn.sequence.length() + row;
            const CacheView view = turn.sequence.view(step.cache, kv_head);
            const size_t here = size_t(row) * q + size_t(kv_head) * group * head;
            const float *queries = s.outputs[size_t(step.queries)].data() + here;
            float *out = s.attended.data() + here;
            const int first = step.window > 0 ? std::max(0, position + 1 - step.window) : 0;
            std::memset(out, 0, size_t(group) * head * sizeof(float));
            for (int g = 0; g < group; ++g) best[g] = -1e30f, weights[g] = 0;
            for (int chunk = first / CHUNK_POSITIONS; chunk <= position / CHUNK_POSITIONS; ++chunk) {
                kernels_.attend(cache_, view, std::max(first, chunk * CHUNK_POSITIONS),
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
