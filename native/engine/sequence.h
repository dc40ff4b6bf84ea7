// One text of a model: its tokens, and the keys and values that they left behind. A model holds nothing of a text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitpress {

// How much there is to keep: for every step of attention and key-value head, `context` positions of `head` elements.
struct CacheShape {
    int attentions = 0, kv_heads = 0, head = 0, context = 0;
    size_t positions() const { return size_t(context + 63) / 64 * 64 + 64; }  // attention reads up to 64 at once
    size_t bytes_per_position(const CacheKind &kind) const {
        return size_t(attentions) * kv_heads * 2 * (size_t(head) * kind.element_bytes + (kind.scales ? sizeof(float) : 0));
    }
};

class Sequence {
  public:
    // `model` is the serial number of the model that the text is of. Throws std::bad_alloc.
    Sequence(const CacheKind &kind, const CacheShape &shape, uint64_t model);
    ~Sequence();
    Sequence(const Sequence &) = delete;
    Sequence &operator=(const Sequence &) = delete;

    CacheView view(int attention, int kv_head) const;
    uint64_t model() const { return model_; }
    int length() const { return int(tokens_.size()); }
    int room() const { return shape_.context - length(); }
    const std::vector<int32_t> &tokens() const { return tokens_; }
    void truncate(int length) { tokens_.resize(size_t(length)); }
    // Makes room for `count` more tokens, so that `append` cannot fail.
    void reserve(int count) { tokens_.reserve(tokens_.size() + size_t(count)); }
    void append(const int32_t *tokens, int count) { tokens_.insert(tokens_.end(), tokens, tokens + count); }

  private:
    size_t matrix_bytes() const { return (shape_.positions() * shape_.head * kind_.element_bytes + 63) / 64 * 64; }
    size_t head_bytes() const;

    const CacheKind &kind_;
    const CacheShape shape_;
    const uint64_t model_;
    std::vector<int32_t> tokens_;
    // one anonymous mapping: pages that no position has reached take no memory
    void *memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace bitpress
