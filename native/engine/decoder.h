// A decoder: runs the steps of its layers on a text, tokens in, logits out.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "products.h"
#include "program.h"
#include "sequence.h"

namespace bitpress {

struct Rope {
    std::vector<float> frequencies;  // radians a position, one for each rotated pair
    float factor = 1;                // on cosine and sine
};

struct DecoderShape {
    int hidden = 0, heads = 0, kv_heads = 0, head = 0, vocabulary = 0, context = 0;
    float eps = 0, attention_scale = 0, embedding_scale = 1;
    bool tanh_gelu = false;
    std::vector<float> final_norm;
};

struct DecoderOptions {
    int threads = 1;
    bool byte_activations = true;  // inputs of products are rounded to bytes
    bool float_prompts = false;    // but not those of many rows, unless there are tiles of bf16
    const char *cache = "fp16";
    const char *path = "";
};

class Decoder {
  public:
    Decoder(DecoderShape shape, Program program, std::vector<Rope> ropes, const Linear *embedding, const Linear *head,
            const DecoderOptions &options);
    Decoder(const Decoder &) = delete;
    Decoder &operator=(const Decoder &) = delete;

    std::unique_ptr<Sequence> sequence() const { return std::make_unique<Sequence>(cache_, cache_shape(), serial_); }

    // Runs `count` tokens behind those of the sequence. Gives logits of the last one, or of all: [rows][vocabulary], until the next
    // call. The sequence must be one of this decoder; tokens must be in the vocabulary and fit the context.
    const float *forward(Sequence &sequence, const int32_t *tokens, int count, bool all_logits);

    uint64_t serial() const { return serial_; }
    const DecoderShape &shape() const { return shape_; }
    size_t cache_bytes_per_position() const { return cache_shape().bytes_per_position(cache_); }
    int threads() const { return pool_.threads(); }

    // Seconds that the first thread has spent in each kind of step since the last call, its waiting at the step's end included.
    enum TimedPart { NORMS, PRODUCTS, ATTENTION, GATES, HEAD, PARTS };
    static const char *const part_names[PARTS];
    std::vector<double> take_times();
    // Inputs of products of many rows so far, and how many of them stood apart in float.
    int64_t inputs() const { return inputs_; }
    int64_t inputs_apart() const { return inputs_apart_; }
    const char *path() const { return kernels_.name; }

  private:
    // The residual stream and the inputs of products. A single token's are small: every thread keeps its own and computes them anew, so
    // that threads meet only around products. Of many tokens they are shared, each thread fills its own rows, and all meet once more.
    struct Rows {
        Aligned<float> hidden, normed;
        std::vector<Input> inputs;
        Input to_head;
    };

    struct Shared {
        std::vector<Aligned<float>> outputs;
        Aligned<float> attended, gates, ups, acted, logits;
        // partial attention of one token: [kv head][chunk][query head of the group]
        Aligned<float> tops, sums, parts;
        // the cache of one step of attention as tiles: [kv head][position, in blocks of 32]
        Aligned<uint16_t> key_tiles, value_tiles;
    };

    // What one thread does of a call of `forward`.
    struct Turn {
        int thread, count;
        bool alone;    // a single token
        int from, to;  // the rows that this thread fills
        Rows &own;
        const Sequence &sequence;
        std::chrono::steady_clock::time_point clock;
    };

    CacheShape cache_shape() const { return {program_.attentions, shape_.kv_heads, shape_.head, shape_.context}; }
    void make_room(int length, int count, bool all_logits);

    // decoder.cpp: a call from its tokens to its logits
    void run(Turn &turn, const int32_t *tokens, bool all_logits);
    void embed(const Turn &turn, const int32_t *tokens) const;
    void begin(Turn &turn, const Layer &layer);
    void take(Turn &turn, const Norm &step);
    void take(Turn &turn, const Multiply &step);
    void take(Turn &turn, const Gate &step);
    void take(Turn &turn, const Add &step);
    void end(Turn &turn);
    void multiply_head(Turn &turn, bool all_logits);
    const float *normed(const Turn &turn, const std::vector<float> &norm, int row);
    void lap(Turn &turn, TimedPart part);
    void note_apart(const Turn &turn, const Input &input);
    // Meets the others where rows are shared: those of a single token are everybody's own.
    void meet(const Turn &turn) {
        if (!turn.alone) pool_.wait();
    }

    // decoder_attention.cpp
    void take(Turn &turn, const Attend &step);
    void attend_one(const Turn &turn, const Attend &step);
    void merge(int chunks, float *to) const;
    void remember_rows(const Turn &turn, const Attend &step);
    void attend_rows(const Turn &turn, const Attend &step);
    void attend_blocks(const Turn &turn, const Attend &step);
    bool tiles(int count) const;
    void rotate(float *head, int rope, const std::vector<float> &norm, int position) const;

    void check_finite(const float *x, int count);
    void prepare(Input &to, const float *x, int row) {
        if (!to.prepare(kernels_, x, row)) overflowed_ = true;
    }
    // Whether products of so many rows round their inputs to bytes (or to bf16, where there are tiles for it).
    bool bytes(int rows) const { return rows > MOST_ROWS ? byte_prompts_ : byte_activations_; }

    const uint64_t serial_;
    const Kernels &kernels_;
    const CacheKind &cache_;
    DecoderShape shape_;
    Program program_;
    std::vector<Rope> ropes_;
    std::vector<std::vector<float>> cosines_, sines_;  // [rope][position][pair]
    const Linear *embedding_, *head_;
    bool byte_activations_, byte_prompts_;
    Pool pool_;
    std::atomic<bool> overflowed_{false};  // by any thread, since `forward` began
    double times_[PARTS] = {};
    int64_t inputs_ = 0, inputs_apart_ = 0;

    Shared shared_;
    std::vector<std::unique_ptr<Rows>> rows_;  // one a thread, and one that all share
    std::vector<Scratch> scratch_;
};

}  // namespace bitpress
