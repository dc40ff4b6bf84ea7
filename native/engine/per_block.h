// What blocks of weights share: a scale, a zero point, the number of a table of levels; one value for every block, as small as in a file.
#pragma once

#include "aligned.h"

namespace bitpress {

constexpr int STRIP = 16;  // output rows side by side in one vector

constexpr size_t SIX = 12;  // bytes of sixteen values of 6 bits

struct PerBlock {
    int bits = 0;  // of a value: 1, 2, 4, 6, 8, 16 or 32, or 0 where there is none. Of 6: sixteen times 4 bits, then sixteen times 2
    int rows = 0, groups = 0;
    int tall = 1;             // rows of a block
    Aligned<uint8_t> values;  // blocks of one row: [strip][group][16 rows]; taller ones: [row of blocks][group]

    bool any() const { return bits != 0; }
    bool striped() const { return tall == 1; }
    int down() const { return (rows + tall - 1) / tall; }
    size_t count() const { return size_t(striped() ? (rows + STRIP - 1) / STRIP * STRIP : down()) * groups; }
    size_t size() const { return bits == 6 ? (count() + 15) / 16 * SIX : (count() * bits + 7) / 8; }
    size_t index(int row, int group) const {
        return striped() ? (size_t(row / STRIP) * groups + group) * STRIP + row % STRIP : size_t(row / tall) * groups + group;
    }
    // The 16 values of a strip, of blocks of one row.
    const uint8_t *lanes(int strip, int group) const { return values.data() + (size_t(strip) * groups + group) * 2 * bits; }
    const uint8_t *bytes_of(int row, int group) const { return values.data() + index(row, group) * (bits / 8); }
    unsigned code(int row, int group) const {
        const size_t place = index(row, group), at = place * bits;
        if (bits != 6) return values[at / 8] >> at % 8 & ((1u << bits) - 1);
        const uint8_t *p = values.data() + place / 16 * SIX;
        const size_t i = place % 16;
        return (p[i / 2] >> i % 2 * 4 & 15u) | (p[8 + i / 4] >> i % 4 * 2 & 3u) << 4;
    }
    // Takes values [row of blocks][group], whole bytes each.
    void fill(const uint8_t *from);
};

// The bits that hold a value of so many: 1, 2, 4 or 8.
inline int bits_that_hold(int bits) { return bits <= 2 ? bits : bits <= 4 ? 4 : 8; }

// s4, s6, s8: codes times a factor of their row. p2row: 2^-code times that factor, 0 for the last code. dq: a map's level times a factor for
// every 256 scales, plus an offset, not below 0. run4, run6, run8: codes plus an offset, times a factor that a run of scales of the row shares.
enum class ScaleKind : uint8_t { f32, f16, bf16, e8m0, e4m3, s4, s8, p2row, dq, s6, run4, run6, run8 };
constexpr int SCALE_KINDS = 13;
int scale_bits(ScaleKind kind);

constexpr int SHARED_BY = 256;  // scales of `dq` that share a factor
extern const float SHIFTS[16];  // of p2row

struct Scales {
    ScaleKind kind = ScaleKind::f32;
    PerBlock each;
    Aligned<float> rows;    // of s4, s6, s8, p2row: [row of blocks], whole strips of them where those are single rows
    Aligned<float> shared;  // of dq: the levels of its map [256], then the factors
    float offset = 0;       // of dq and runs
    int planes = 1, plane = 0;  // of dq and runs: a file has the scales of so many planes side by side, and factors for all of them
    int run_bits = 0;           // 2^run_bits scales share a factor
    PerBlock factors;           // of runs, in fp16: for every block of a row and every run

    size_t bytes() const { return each.values.bytes() + rows.bytes() + shared.bytes() + factors.values.bytes(); }
    bool has_runs() const { return kind >= ScaleKind::run4; }
    int run_of(int group) const { return int((unsigned(group) * unsigned(planes) + unsigned(plane)) >> run_bits); }
    // Sets the runs up, for `each`, `run_bits` and `planes`; their factors are to be filled.
    void shape_factors();
    bool has_rows() const { return kind == ScaleKind::s4 || kind == ScaleKind::s6 || kind == ScaleKind::s8 || kind == ScaleKind::p2row; }
    size_t row_count() const { return size_t(each.striped() ? (each.rows + STRIP - 1) / STRIP * STRIP : each.down()); }
    size_t shared_count() const { return 256 + (size_t(each.down()) * each.groups * planes + SHARED_BY - 1) / SHARED_BY; }
};

// One scale, without the matrix's gain.
float scale_at(const Scales &scales, int row, int group);

// What is taken away from the codes of a block (a zero point between codes), or from its weights (a minimum).
struct Less {
    Scales scales;
    float gain = 1;
    bool of_codes = false;

    bool any() const { return scales.each.any(); }
    size_t bytes() const { return any() ? scales.bytes() : 0; }
};

}  // namespace bitpress
