// Weights as the products read them: strips of 16 output rows, laid out so that memory is read once and in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "maps.h"

namespace bitpress {

constexpr int STRIP = 16;       // output rows side by side in one vector
constexpr int MAX_BLOCK = 128;  // columns that share one scale of the activations, at most
constexpr int SEGMENT = 64;     // columns of a tile product between two rescalings: smaller groups are put together up to here

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

enum class ScaleKind : uint8_t { f32, f16, bf16, e8m0, e4m3 };
int scale_bytes(ScaleKind kind);
float scale_value(ScaleKind kind, const uint8_t *p);  // without the matrix's gain

// How columns are cut: groups share a weight scale, blocks of a group share a scale of the activations, and every block is
// padded with zero activations to whole lines. Matrices cut alike can share quantized activations.
struct Cut {
    int columns = 0, group = 0, block = 0, width = 0;  // width: a block with its padding
    int groups = 0, blocks_per_group = 0, per_segment = 1;
    bool operator==(const Cut &) const = default;
    int blocks() const { return groups * blocks_per_group; }
    int padded() const { return blocks() * width; }
    int first_column(int b) const { return b / blocks_per_group * group + b % blocks_per_group * block; }
    int columns_of(int b) const {
        const int left = group - b % blocks_per_group * block, in_row = columns - first_column(b);
        return std::min(std::min(block, left), in_row);
    }
    // Tile products rescale once a segment: some whole blocks, padded to whole tiles of 64 columns.
    int blocks_per_segment() const { return per_segment; }
    int segments() const { return (blocks() + per_segment - 1) / per_segment; }
    int blocks_of_segment(int s) const { return std::min(blocks_per_segment(), blocks() - s * blocks_per_segment()); }
    int tiles_of_segment(int s) const { return (blocks_of_segment(s) * width + 63) / 64; }
    int tiles_per_segment() const { return (blocks_per_segment() * width + 63) / 64; }
    int tiles() const { return (segments() - 1) * tiles_per_segment() + tiles_of_segment(segments() - 1); }
};

// Throws std::invalid_argument where groups are so small, and rows so long, that padded columns cannot be counted.
Cut make_cut(int columns, int group, int bits);

// Codes of 1 to 8 bits with a scale a group: w = scale * gain * (value - zero), the value being the code or a table's byte.
struct Coded {
    int rows = 0, bits = 0, zero = 0;
    Cut cut;
    ScaleKind kind = ScaleKind::f32;
    float gain = 1;
    int reach = 0;  // the largest |value - zero|
    // Whether tiles hold nothing beyond 63: whole values of codes, one group a segment.
    bool small() const { return cut.per_segment == 1 && reach <= 63; }
    bool has_zeros = false, has_table = false;
    uint8_t table[16] = {};   // bytes of the levels, less the zero of 128
    float levels[16] = {};    // the levels themselves, already without a zero: w = scale * level
    Aligned<uint8_t> lines;   // [strip][block][line of 64 bytes]
    Aligned<uint8_t> scales;  // [strip][group][16] of `kind`
    Aligned<uint8_t> zeros;   // [strip][group][16]

    int strips() const { return (rows + STRIP - 1) / STRIP; }
    size_t block_bytes() const { return size_t(cut.width) * bits * STRIP / 8; }
    const uint8_t *block(int strip, int b) const { return lines.data() + (size_t(strip) * cut.blocks() + b) * block_bytes(); }
    const uint8_t *scale(int strip, int g) const {
        return scales.data() + (size_t(strip) * cut.groups + g) * STRIP * scale_bytes(kind);
    }
    const uint8_t *zero_points(int strip, int g) const { return zeros.data() + (size_t(strip) * cut.groups + g) * STRIP; }
    size_t bytes() const { return lines.bytes() + scales.bytes() + zeros.bytes(); }
    void find_reach();
};

// Sixteen-bit weights, for what has no codes or no layout of its own: [strip][column][16].
struct Dense {
    int rows = 0, columns = 0;
    bool half = false;  // fp16, otherwise bf16
    Aligned<uint16_t> values;
    Aligned<float> gain;  // [rows], empty where it is 1

    int strips() const { return (rows + STRIP - 1) / STRIP; }
    const uint16_t *strip(int s) const { return values.data() + size_t(s) * columns * STRIP; }
    size_t bytes() const { return values.bytes() + gain.bytes(); }
};

// Single weights beside the codes, by row.
struct Sparse {
    std::vector<int64_t> starts;  // [rows + 1]
    std::vector<int32_t> columns;
    std::vector<float> values;
    size_t bytes() const { return starts.size() * 8 + columns.size() * 8; }
};

// Who is at a layer. Those who fill it take turns; nobody fills it while it is in use: by a product under way, by arrays of its memory,
// or by a model for as long as there is one, whose plans it would no longer fit.
class Turns {
  public:
    // Keeps everybody else out. Throws std::invalid_argument where the layer is used.
    std::unique_lock<std::mutex> fill();
    // Waits for those who fill.
    void begin_use();
    void end_use();

  private:
    std::mutex mutex_;
    int users_ = 0;
};

// One linear layer: y = T x @ (sum of terms).T + bias, T the input map.
struct Linear {
    int rows = 0, columns = 0;
    mutable Turns turns;
    std::vector<Coded> coded;
    std::vector<Dense> dense;
    std::unique_ptr<Dense> down, up;  // a low-rank product: up @ (down @ x)
    std::unique_ptr<Sparse> sparse;
    Aligned<float> bias;
    std::shared_ptr<const InputMap> map;
    std::shared_ptr<void> owner;  // of memory that the parts borrow

    int strips() const { return (rows + STRIP - 1) / STRIP; }
    size_t bytes() const;
    void row(int r, float *out) const;  // one row in float, slowly: an embedding's look-up
};

// A use of a layer, as long as this lives.
class Use {
  public:
    explicit Use(const Linear &linear) : linear_(&linear) { linear.turns.begin_use(); }
    Use(Use &&other) noexcept : linear_(std::exchange(other.linear_, nullptr)) {}
    Use &operator=(Use &&) = delete;
    ~Use() {
        if (linear_ != nullptr) linear_->turns.end_use();
    }

  private:
    const Linear *linear_;
};

// Lay codes [rows, columns] (one byte each), scales [rows, groups] and zero points [rows, groups] (or none) out in strips.
struct CodedParts {
    int rows, columns, bits, group;
    const uint8_t *codes;
    ScaleKind kind;
    const uint8_t *scales;
    float gain;
    const uint8_t *zeros;  // or null, and then `zero` for all
    int zero;
    const uint8_t *table;   // 16 bytes or null
    const float *levels;    // 16 floats, beside a table
};
Coded lay_out(const CodedParts &parts, int threads);
Dense lay_out_dense(int rows, int columns, const uint16_t *values, bool half, const float *gain, int threads);

int code_at(const Coded &m, int row, int column);

}  // namespace bitpress
