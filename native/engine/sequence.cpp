#include "sequence.h"

#include <sys/mman.h>

#include <new>

namespace bitpress {

Sequence::Sequence(const CacheKind &kind, const CacheShape &shape, uint64_t model) : kind_(kind), shape_(shape), model_(model) {
    size_ = head_bytes() * size_t(shape_.kv_heads) * size_t(shape_.attentions);
    if (size_ == 0) return;  // a model without attention
    memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
}

Sequence::~Sequence() {
    if (size_ != 0) munmap(memory_, size_);
}

size_t Sequence::head_bytes() const {
    const size_t bytes = 2 * matrix_bytes() + (kind_.scales ? 2 * shape_.positions() * sizeof(float) : 0);
    return (bytes + 63) / 64 * 64;
}

CacheView Sequence::view(int attention, int kv_head) const {
    uint8_t *base = static_cast<uint8_t *>(memory_) + (size_t(attention) * size_t(shape_.kv_heads) + size_t(kv_head)) * head_bytes();
    CacheView view;
    view.head = shape_.head;
    view.keys = base;
    view.values = base + matrix_bytes();
    if (kind_.scales) {
        view.key_scales = reinterpret_cast<float *>(base + 2 * matrix_bytes());
        view.value_scales = view.key_scales + shape_.positions();
    }
    return view;
}

}  // namespace bitpress
