// Memory of vectors: owned and aligned to cache lines, or borrowed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace bitpress {

// Zeroed memory that begins with a cache line; large pieces ask for huge pages, because rows of a matrix lie on many small ones.
void *take_memory(size_t bytes);
void give_memory(void *memory);

template <class T> class Aligned {
  public:
    Aligned() = default;
    explicit Aligned(size_t count) { resize(count); }
    void resize(size_t count) {
        if (count > capacity_) {
            data_ = {static_cast<T *>(take_memory((count * sizeof(T) + 255) / 64 * 64)), Free{}};  // vectors may read over the end
            capacity_ = count;
        }
        size_ = count;
    }
    // Uses memory of somebody else, who keeps it as it is: nothing may be written through this, nor read over the end.
    void borrow(const T *theirs, size_t count) {
        data_ = {const_cast<T *>(theirs), Free{false}};
        size_ = count;
        capacity_ = 0;
    }
    T *data() { return data_.get(); }
    const T *data() const { return data_.get(); }
    T &operator[](size_t i) { return data_.get()[i]; }
    const T &operator[](size_t i) const { return data_.get()[i]; }
    size_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }

  private:
    struct Free {
        bool owned = true;
        void operator()(T *p) const {
            if (owned) give_memory(static_cast<void *>(p));
        }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0, capacity_ = 0;
};

}  // namespace bitpress
