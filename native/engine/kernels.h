// The table of a code path: every inner loop of the engine, one set per vector unit.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "rounding.h"

namespace bitpress {

// Rows of activations as two digits, x = scale * (128 * high + low) in 14 bits: [row][high, low][padded columns], with a scale and a
// sum of 128 * high + low for every block of a row. No digit is beyond 64, so that sums of two products with bytes fit 16 bits.
struct Quantized {
    Cut cut;
    Aligned<int8_t> values;
    Aligned<float> scales;
    Aligned<int32_t> sums;
    void fit(const Cut &to, int rows) {
        cut = to;
        values.resize(size_t(rows) * 2 * cut.padded());
        scales.resize(size_t(rows) * cut.blocks());
        sums.resize(size_t(rows) * cut.blocks());
    }
};

// A value that 8 bits beside its neighbours would cost too much: it stays in float.
struct Apart {
    int32_t column;  // in tiles
    float value;
};

// Rows in 8 bits for tile products: [tile of 16 rows][tile of 64 columns][16][64], a scale for every row and segment. Values far above
// a row's others are zeros there and stand apart.
struct Tiled {
    Cut cut;
    int rows = 0;
    Aligned<int8_t> values;
    Aligned<float> scales;  // [segment][rows padded to 32]
    Aligned<int32_t> sums;  // likewise
    Aligned<Apart> apart;   // [row][most_apart], by column
    Aligned<int32_t> apart_counts;
    int most_apart() const { return cut.columns / 4 + 8; }
    int padded_rows() const { return (rows + 31) / 32 * 32; }
    void fit(const Cut &to, int count) {
        cut = to;
        rows = count;
        values.resize(size_t(padded_rows()) * cut.tiles() * 64);
        scales.resize(size_t(padded_rows()) * cut.segments());
        sums.resize(size_t(padded_rows()) * cut.segments());
        apart.resize(size_t(rows) * most_apart());
        apart_counts.resize(size_t(rows));
    }
    int8_t *tile(int row_tile, int column_tile) {
        return values.data() + (size_t(row_tile) * cut.tiles() + column_tile) * 1024;
    }
    const int8_t *tile(int row_tile, int column_tile) const { return const_cast<Tiled *>(this)->tile(row_tile, column_tile); }
};

// Rows in bf16 for products on tiles: [tile of 16 rows][tile of 32 columns][16][32], the padded columns.
struct HalfRows {
    Cut cut;
    int rows = 0;
    Aligned<uint16_t> values;
    int padded_rows() const { return (rows + 31) / 32 * 32; }
    int column_tiles() const { return (cut.padded() + 31) / 32; }
    void fit(const Cut &to, int count) {
        cut = to;
        rows = count;
        values.resize(size_t(padded_rows()) * column_tiles() * 32);
    }
    uint16_t *tile(int row_tile, int column_tile) {
        return values.data() + (size_t(row_tile) * column_tiles() + column_tile) * 512;
    }
    const uint16_t *tile(int row_tile, int column_tile) const { return const_cast<HalfRows *>(this)->tile(row_tile, column_tile); }
};

// The keys and values of one layer and one key-value head, in the order of their kind.
struct CacheView {
    int head = 0;  // elements of a head
    void *keys = nullptr, *values = nullptr;
    float *key_scales = nullptr, *value_scales = nullptr;  // [position], of kinds that have scales
};

// One way to keep keys and values, and what a code path does with them.
struct CacheKind {
    const char *name;
    int element_bytes;
    bool scales;  // a float for the key and one for the value of every position

    void (*write)(const CacheView &, int at, const float *key, const float *value);
    // to[query][whole pieces in steps of 64] = queries [count][head] . the keys of blocks of 16 positions from `start` on, a multiple of 16
    void (*score)(const CacheView &, int start, int blocks, const float *queries, int count, float *to);
    // out[query][head] = the same rows of weights . the values; weights of positions behind the last one, up to a multiple of 16, are 0
    void (*weigh)(const CacheView &, int start, int positions, const float *weights, int count, float *out);
    // The cache as tiles of bf16 for attend_tiles, blocks of 32 positions from..to of `length`; null where there are none.
    void (*tile)(const CacheView &, int from, int to, int length, uint16_t *keys, uint16_t *values) = nullptr;
};

constexpr int MOST_ROWS = 4;      // rows of a direct product
constexpr int MOST_HEAD = 512;    // elements of a head
constexpr int MOST_CACHES = 8;    // kinds of caches
constexpr int ROW_BLOCK = 128;        // rows of a tile product whose sums stay in the first cache
constexpr float APART = 5;               // times the mean magnitude of a row: values beyond stand apart
constexpr int MANY_APART = 16;          // where more than this part of a row would:
constexpr float CLOSER = 0.5f;          // so much of that bound
constexpr int CHUNK_POSITIONS = 256;  // positions that one piece of attention looks at

// Rows as whole numbers, by a rounding of the model's own, in the order of the cut: codes less the middle of all codes in bytes, or less
// their zero point in 16 bits.
struct IntegerRows {
    Cut cut;
    int rows = 0, bytes = 1;  // bytes: of a number
    Aligned<int8_t> values;   // [row][padded columns]
    Aligned<float> scales;    // [row][group]
    Aligned<int32_t> sums;    // [row][group], of codes less their zero point
    Aligned<int32_t> less;    // [row][group]: the zero point less the middle
    void fit(const Cut &to, int count, int each) {
        cut = to;
        rows = count, bytes = each;
        const size_t padded = count <= MOST_ROWS ? size_t(count) : size_t(count + 63) / 64 * 64;  // whole tiles, and their reach over the end
        values.resize(padded * cut.padded() * bytes + 64);
        scales.resize(size_t(rows) * cut.groups);
        sums.resize(size_t(rows) * cut.groups), less.resize(size_t(rows) * cut.groups);
    }
};

// Where the sums of a tile product go: they stay, or are put there strip by strip, or as act(first strip) * second strip.
struct Put {
    enum Mode { stay, both, silu, gelu } mode = stay;
    float *left = nullptr, *right = nullptr;  // [row * stride]; `left` alone takes gated sums
    int stride = 0;
};

// The weights of two strips as signed bytes. `panel` and `known` are memory for single columns in float.
struct Tiles {
    const int8_t *bytes;   // [segment][strip][tiles_per_segment]
    const float *scales;   // [segment][strip][16]
    bool small;            // no byte is beyond 63
    float *panel;          // [tile columns][32]
    uint8_t *known;        // [tile columns]
};

// Floats of memory that attend_tiles works in.
constexpr size_t tile_scratch(int head) { return size_t(32) * CHUNK_POSITIONS * 2 + size_t(64) * head + 256; }

struct Kernels {
    const char *name;

    // out[row][16] += the strip's weights times rows (1 to 4) of x
    void (*coded_bytes)(const Coded &, int strip, const Quantized &, int first, int rows, float *out);
    void (*coded_floats)(const Coded &, int strip, const float *x, int stride, int rows, float *out);
    void (*dense_floats)(const Dense &, int strip, const float *x, int stride, int rows, float *out);

    // one strip in float: [padded column][16], [column][16]
    void (*decode_coded)(const Coded &, int strip, float *to);
    void (*decode_dense)(const Dense &, int strip, float *to);
    // out[row][16] += panel [columns][16] times any number of rows
    void (*panel_floats)(const float *panel, int columns, const float *x, int stride, int rows, float *out, int out_stride);

    // one segment of a strip as tiles of signed bytes [tile][16][16 rows x 4 columns], and its scale for every row
    void (*fill_tiles)(const Coded &, int strip, int segment, int8_t *tiles, float *scales);
    // The same of sixteen-bit weights, whose columns are cut like those of codes.
    void (*fill_tiles_dense)(const Dense &, const Cut &, int strip, int segment, int8_t *tiles, float *scales);
    // out[row][32] += two strips times all rows of x, padded ones included. The sums of the true rows end up where `put` says.
    void (*tile_product)(const Tiled &x, const Tiles &, float *out, const Put &put);

    // On processors with tiles of bf16 such a product takes the place of the one in bytes; null elsewhere. `tiles` is
    // [strip][tile of 32 columns][16 pairs of columns][16 rows][2]; one strip of that is filled by the two functions before it.
    void (*fill_halves)(const Coded &, int strip, uint16_t *tiles);
    void (*fill_halves_dense)(const Dense &, int strip, uint16_t *tiles);
    void (*half_product)(const HalfRows &x, const uint16_t *tiles, float *out, const Put &put);
    void (*halve)(const float *x, int row, HalfRows &to);

    // Products of whole numbers. Many rows hold them in `integer_bytes` each, few rows in one.
    int integer_bytes;
    // Says whether every scale is finite.
    bool (*round_row)(const float *x, int row, const Rounding &, IntegerRows &to);
    // out[row][16] += the strip's weights times all rows (1 to 4) of x
    void (*integers_few)(const Coded &, int strip, const IntegerRows &x, float *out);
    // The codes of a strip [group][tiled_group() columns][16 rows]: lines of 64 bytes with four columns of bytes, or with two in 16 bits that
    // have their zero points taken away.
    void (*unpack_integers)(const Coded &, int strip, int bytes, int8_t *to);
    // out[row][stride] += the strip's weights times all rows of x
    void (*integers_many)(const Coded &, int strip, const IntegerRows &x, const int8_t *tiles, float *out, int stride);
    // The sums [row][16] of bytes of a group and of rows from..to, as floats added to out.
    void (*put_integers)(const Coded &, int strip, int group, const IntegerRows &x, int from, int to, const int32_t *sums, float *out, int stride);

    void (*quantize)(const float *x, const Cut &, int8_t *values, float *scales, int32_t *sums);
    void (*quantize_tiled)(const float *x, int row, Tiled &to);
    void (*pad)(const float *x, const Cut &, float *to);
    // A step of a map: to = (left ⊗ right) (factors * x) block by block; factors may be null, and x may be `to`. `spare` has room for a row,
    // and for two strips of `across` rows.
    void (*mix)(const Mixing &, const float *x, const float *factors, float *to, int columns, float *spare);

    void (*norm)(const float *x, const float *weight, int n, float eps, float *to);
    void (*add)(const float *x, int n, float *to);
    void (*scale)(float factor, int n, float *to);
    // to[row][lanes] = from[row][16], and act(from[row][16]) * from[row][16 ..]
    void (*put_rows)(const float *from, int from_stride, int rows, int lanes, float *to, int to_stride);
    void (*put_sums)(const float *out, int from, int to, const Put &put);
    void (*put_gated)(const float *from, int rows, int lanes, bool tanh_gelu, float *to, int to_stride);
    void (*gate)(const float *gate, const float *up, int n, bool tanh_gelu, float *to);
    void (*rotate)(float *x, const float *cosines, const float *sines, int half);

    const CacheKind *caches;
    int cache_kinds;
    // Attends rows of queries [count][head] (already scaled) over positions from..to, CHUNK_POSITIONS at most: the largest score, the sum
    // of exponentials and the weighted values, for every query.
    void (*attend)(const CacheKind &, const CacheView &, int from, int to, const float *queries, int count, float *largest, float *sums,
                   float *out);

    // Attention of many rows on tiles, null where there are none: 32 rows of one query head, the first at `position`: [row][stride] in
    // and out.
    void (*attend_tiles)(int head, const uint16_t *keys, const uint16_t *values, int position, int rows, int window,
                         const float *queries, int stride, float *out, float *scratch);

    // `repeats` rounds of the path's byte products on registers alone, each of `peak_operations` multiplications and additions
    void (*peak)(int repeats);
    double peak_operations;
    int peak_repeats;
};

double measure_reading(size_t bytes, int threads);
double measure_multiplying(const Kernels &, int threads);

const Kernels &portable_kernels();
const Kernels *avx2_kernels();    // null where the processor or the compiler lacks it
const Kernels *avx512_kernels();
const Kernels *amx_kernels();
const Kernels &emulated_kernels();  // tiles written out, for tests: only by name

// The best path that this processor runs, or the one of that name. Throws std::invalid_argument.
const Kernels &choose_kernels(const char *name);

// A code path's kind of cache of that name. Throws std::invalid_argument that lists them.
const CacheKind &choose_cache(const Kernels &kernels, const char *name);

}  // namespace bitpress
