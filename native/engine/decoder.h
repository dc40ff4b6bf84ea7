// A whole decoder of the Llama family: tokens in, logits out, the cache kept between.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "products.h"

namespace bitpress {

struct LayerWeights {
    const Linear *q = nullptr, *k = nullptr, *v = nullptr, *o = nullptr, *gate = nullptr, *up = nullptr, *down = nullptr;
    std::vector<float> input_norm, mlp_norm;                 // before attention and before the MLP
    std::vector<float> attention_out_norm, mlp_out_norm;     // behind them, where there are such (Gemma 3)
    std::vector<float> q_norm, k_norm;                       // of every head, where there are such (Qwen3, Gemma 3)
    int rope = 0;                                            // which rotation, or -1 for none
    int window = 0;                                          // positions that attention looks back on, itself included; 0: all
};

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

class Decoder {
  public:
    Decoder(DecoderShape shape, std::vector<LayerWeights> layers, std::vector<Rope> ropes, const Linear *embedding,
            const Linear *head, int threads, bool byte_activations, bool float_prompts, bool byte_cache, const char *path);
    ~Decoder();
    Decoder(const Decoder &) = delete;
    Decoder &operator=(const Decoder &) = delete;

    // Runs `count` tokens behind those of the cache. Gives logits of the last one, or of all: [rows][vocabulary], until the next
    // call. Tokens must be in the vocabulary and fit the context.
    const float *forward(const int32_t *tokens, int count, bool all_logits);

    int length() const { return length_; }
    void truncate(int length) { length_ = length; }
    const DecoderShape &shape() const { return shape_; }
    size_t cache_bytes_per_position() const;
    int threads() const { return pool_.threads(); }

    // Seconds that the first thread has spent in each part since the last call, its waiting at the part's end included.
    static constexpr int PARTS = 8;
    static const char *const part_names[PARTS];
    std::vector<double> take_times();
    // Inputs of products of many rows so far, and how many of them stood apart in float.
    int64_t inputs() const { return inputs_; }
    int64_t inputs_apart() const { return inputs_apart_; }
    const char *path() const { return kernels_.name; }

  private:
    struct Rows;  // the activations of the tokens at hand
    CacheView cache(int layer, int kv_head) const;
    size_t cache_positions() const { return size_t(shape_.context + 63) / 64 * 64 + 64; }  // attention reads up to 64 at once
    void run(int thread, Rows &own, const int32_t *tokens, int count, bool all_logits);
    void attend_rows(int thread, int layer, int count);
    bool tiles(int count) const;
    void attend_blocks(int thread, int layer, int count);
    void merge(int chunks, float *to) const;
    void check_finite(const float *x, int count);
    // Whether products of so many rows round their inputs to bytes (or to bf16, where there are tiles for it).
    bool bytes(int rows) const { return rows > MOST_ROWS ? byte_prompts_ : byte_activations_; }
    void rotate(const LayerWeights &l, float *head, const std::vector<float> &norm, int position) const;

    const Kernels &kernels_;
    DecoderShape shape_;
    std::vector<LayerWeights> layers_;
    std::vector<Rope> ropes_;
    std::vector<std::vector<float>> cosines_, sines_;  // [rope][position][pair]
    const Linear *embedding_, *head_;
    bool byte_activations_, byte_prompts_, byte_cache_;
    Pool pool_;
    int length_ = 0;
    std::atomic<bool> overflowed_{false};  // by any thread, since `forward` began
    double times_[PARTS] = {};
    int64_t inputs_ = 0, inputs_apart_ = 0;

    // one anonymous mapping: pages that no position has reached take no memory
    void *cache_memory_ = nullptr;
    size_t cache_size_ = 0, layer_bytes_ = 0, head_bytes_ = 0;

    struct Shared;
    std::unique_ptr<Shared> shared_;
    std::vector<std::unique_ptr<Rows>> rows_;  // one a thread, and one that all share
    std::vector<Scratch> scratch_;
};

}  // namespace bitpress
