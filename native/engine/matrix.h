// Weights as the products read them: strips of 16 output rows, laid out so that memory is read once and in order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "maps.h"
#include "per_block.h"
#include "rounding.h"

namespace bitpress {

constexpr int MAX_BLOCK = 128;  // columns that share one scale of the activations, at most
constexpr int SEGMENT = 64;     // columns of a tile product between two rescalings: smaller groups are put together up to here

// How columns are cut: groups share a weight scale, blocks of a group share a scale of the activations, and every block is
// padded with zero activations to whole lines. Matrices cut alike can share quantized activations.
struct Cut {
    int columns = 0, group = 0, block = 0, width = 0;  // width: a block with its padding
    int groups = 0, blocks_per_group = 0, per_segment = 1;
    bool operator==(const Cut &) const = default;
    int blocks() const { return groups * blocks_per_group; }
    int padded() const { return blocks() * width; }
    int tiled_group() const { return (blocks_per_group * width + 63) / 64 * 64; }  // columns of a group as whole tiles
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

// The fewest columns of codes of so many bits, `span` columns each, that fill whole lines.
int chunk_of(int bits, int span = 1);
constexpr int TRITS_CHUNK = 20, UNEVEN_CHUNK = 64;
// The bits that codes are stored in, so that a chunk is no longer than a block.
int stored_bits(int bits, int span);
// Cuts `columns` into blocks of whole chunks. Throws std::invalid_argument where padded columns cannot be counted.
Cut make_cut(int columns, int group, int chunk);

// What codes stand for, the scale left out. Every kind but the first two is a file in kinds/ and a row of KINDS in kinds.inc.
//   whole     the code less a zero point; a zero point between codes, or a minimum of the weights, is `Coded::less`
//   table     one of at most 256 levels, and the byte next to it
//   levels    one of some tables of levels, a table for every block of weights
//   own       a level of the block's own
//   halves    whole codes less a zero point; the last two are half a step below and above zero
//   words     a vector of a book, or the sum of one from each of several books
//   e8p       a point of the E8 lattice: the signs and the row of the magnitudes
//   trellis   bits of a path down the column: a weight is made of its own code and those of the rows above it
//   pairs     two neighbors: a normal value each, or an outlier beside a victim; a block may name one of several tables of both
//   pyramid   the number of a point whose coordinates' magnitudes have a sum, and whose length is the scale
enum class CodeKind : uint8_t { whole, table, levels, own, halves, words, e8p, trellis, pairs, pyramid };
constexpr int CODE_KINDS = 10;

// How the lines of a block hold codes.
//   planes    of 8, 4, 2 and 1 bits, the low ones first
//   trits     codes below 3, five of them in a byte
//   uneven    codes of odd rows have a bit more than those of even ones: planes of the others' bits, and a plane of the odd rows' highest
enum class Packing : uint8_t { planes, trits, uneven };
constexpr int PACKINGS = 3;

// What makes a weight of a path. `formats/grids/trellis.py` has the rule.
struct Path {
    static constexpr int COUNT = 9;
    int32_t state_bits = 0, shifts[2] = {}, multiplier = 0, polynomial[5] = {};  // bits that even and odd rows add

    void take(const int32_t *from);  // throws std::invalid_argument for values that no path has
    void give(int32_t *to) const;
};

// Codes of 1 to 24 bits with a scale a block: w = scale * gain * value, or scale * gain * (value - less), or scale * gain * value - less.
struct Coded {
    int rows = 0, bits = 0, zero = 0, span = 1;  // span: columns of a code
    Cut cut;
    CodeKind kind = CodeKind::whole;
    Packing packing = Packing::planes;
    int group = 0;      // columns that share a scale
    bool fine = false;  // groups that do not fill chunks: a block of codes has several scales
    float gain = 1;
    float step = 1;  // of the bytes of a table: a level is next to step * (byte - 128)
    int reach = 0;   // the largest |value - zero|
    Scales scales;
    PerBlock zeros, which;     // zero points; numbers of tables
    Less less;                 // of whole codes
    uint8_t table[256] = {};   // bytes of the levels, less the zero of 128
    Aligned<float> levels;     // of a table [code], of levels [table][code]
    Aligned<uint16_t> own;     // in fp16, [strip][group][code][16 rows] or [row of blocks][group][code]
    Aligned<float> words;      // [book][1 << word_bits][span], or
    Aligned<uint16_t> halves;  // in fp16
    Aligned<uint8_t> points;   // of e8p: magnitudes [256][8] in quarters
    int pulses = 0;            // of pyramid: the sum of the magnitudes
    Aligned<uint32_t> counts;  // of pyramid: points of so many numbers and pulses [span][pulses + 1], then the first of each size of the
                               // next number [span][pulses + 1][pulses + 1]
    Path path;                 // of trellis
    int books = 1, word_bits = 0;
    // Bytes next to words or levels, the step being `step`, less a zero of 128. Of words: four numbers of a word in 32 bits,
    // [book][1 << word_bits][words of four], pairs twice; of levels: [table][16].
    Aligned<uint32_t> near_words;
    Aligned<uint8_t> near_levels;
    Aligned<uint8_t> lines;  // [strip][block][line of 64 bytes]
    Aligned<int32_t> picked;  // the columns of the layer that these are, none where these are all
    // Products with inputs of the model's own rounding are sums of whole numbers: every group is cut for itself. `code_sums` are those of
    // the codes [strip][group][16], where inputs have zero points.
    bool whole_sums = false, has_code_sums = false;
    Aligned<int32_t> code_sums;

    // Whether products read the codes as they are.
    bool fast() const { return kind <= CodeKind::table && !fine && packing == Packing::planes; }
    // Whether products with 8-bit activations decode codes to bytes a block at a time; otherwise to floats.
    bool staged_in_bytes() const;
    bool reads_bytes() const { return fast() || staged_in_bytes(); }
    // Whether tiles hold nothing beyond 63: whole values of codes, one group a segment.
    bool small() const { return fast() && !less.any() && cut.per_segment == 1 && reach <= 63; }
    // Whether blocks are decoded to floats with their scales: where one number a block does not say the rest.
    bool staged_whole() const { return fine || less.any(); }
    int strips() const { return (rows + STRIP - 1) / STRIP; }
    void sum_codes(const uint8_t *codes);  // [rows][columns]
    int chunk() const;  // the fewest columns that fill whole lines
    size_t block_bytes() const {
        if (packing == Packing::trits) return size_t(cut.width) / TRITS_CHUNK * 64;
        return size_t(cut.width) / span * (packing == Packing::uneven ? 2 * bits - 1 : 2 * bits) * STRIP / 16;
    }
    // Where column `c` of these is among the columns of the layer.
    int column(int c) const { return picked.size() ? picked[size_t(c)] : c; }
    const uint8_t *block(int strip, int b) const { return lines.data() + (size_t(strip) * cut.blocks() + b) * block_bytes(); }
    size_t level_count() const { return size_t(1) << bits; }
    size_t bytes() const;
    void find_reach();
    void find_near();  // the bytes of words and levels
    void count_points();  // of pyramid
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

// Single weights beside the codes, by row: columns in 16 bits where those are enough, values in fp16 where all of them are.
struct Sparse {
    std::vector<int64_t> starts;  // [rows + 1]
    std::vector<uint16_t> narrow, halves;
    std::vector<int32_t> wide;
    std::vector<float> floats;

    Sparse() = default;
    Sparse(int width, std::vector<int64_t> rows, const int32_t *at, const float *all);
    int column(int64_t i) const { return wide.empty() ? narrow[size_t(i)] : wide[size_t(i)]; }
    float value(int64_t i) const;
    size_t bytes() const { return starts.size() * 8 + (narrow.size() + halves.size()) * 2 + (wide.size() + floats.size()) * 4; }
};

// One factor of a low-rank product: in 16 bits, or in codes.
struct Factor {
    std::unique_ptr<Dense> dense;
    std::unique_ptr<Coded> coded;

    bool any() const { return dense != nullptr || coded != nullptr; }
    int rows() const { return coded ? coded->rows : dense->rows; }
    int columns() const { return coded ? coded->cut.columns : dense->columns; }
    int width() const { return coded ? coded->cut.padded() : dense->columns; }  // of the rows that it is multiplied with
    int strips() const { return (rows() + STRIP - 1) / STRIP; }
    size_t bytes() const { return coded ? coded->bytes() : dense->bytes(); }
    // to[column] += factor * the row's weights
    void add_row(int r, float factor, float *to) const;
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

// One linear layer: y = S ((sum of terms) (T x)) + bias, T the map of its input and S that of its output.
struct Linear {
    int rows = 0, columns = 0;
    mutable Turns turns;
    std::vector<Coded> coded;
    std::vector<Dense> dense;
    Factor down, up;  // a low-rank product: up @ (down @ x)
    std::unique_ptr<Sparse> sparse;
    Aligned<float> bias;
    std::shared_ptr<const InputMap> map, out_map;
    std::optional<Rounding> rounding;  // of its input behind the map
    std::shared_ptr<void> owner;  // of memory that the parts borrow

    int strips() const { return (rows + STRIP - 1) / STRIP; }
    size_t bytes() const;
    // Whether a part reads the values that codes of the input stand for, rather than the codes.
    bool reads_rounded_floats() const {
        return !dense.empty() || sparse || down.any() || std::any_of(coded.begin(), coded.end(), [](const Coded &m) { return !m.whole_sums; });
    }
    // One row in float, slowly: an embedding's look-up. Without the map of the output, and with it: that takes all rows.
    void inner_row(int r, float *out) const;
    void row(int r, float *out) const;
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

// What a matrix of codes is made of, to be laid out in strips. `made` holds all but lines, cut and reach: parameters are as they stay.
struct CodedParts {
    Coded made;
    int columns;
    const uint8_t *codes;  // [rows][columns / span], `size` bytes each
    int size;
};
Coded lay_out(CodedParts parts, int threads);
// Decides how columns are cut, for `bits`, `span`, `kind` and `group`.
void set_cut(Coded &m, int columns);
Dense lay_out_dense(int rows, int columns, const uint16_t *values, bool half, const float *gain, int threads);

int code_at(const Coded &m, int row, int column);

}  // namespace bitpress
