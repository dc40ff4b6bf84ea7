// Matrices of codes as Python gives them, checked.
#pragma once

#include <optional>
#include <string>

#include "arguments.h"
#include "matrix.h"

namespace bitpress {

using Bytes2 = Array<const uint8_t, 2>;

// codes    [rows, codes of a row], 1, 2 or 4 bytes each by `bits`
// scales   [rows of blocks, blocks of a row]; zeros likewise, or `zero` for all
// table    a byte and a level for every code, up to 8 bits
// step     of the bytes of a table: a level is next to step * (byte - 128)
// tall     rows of a block
// shared   what scales share: {"rows"} of s4, s6, s8 and p2row, {"levels", "factors", "offset", "planes", "plane"} of dq,
//          {"factors", "run", "offset", "planes", "plane"} of run4, run6 and run8
// less     what is taken away from codes or weights: {"of_codes", "kind", "values", "gain", "shared"}, as scales are given
// meaning  of codes that are neither whole numbers nor of one table: {"kind", ...} (take_meaning)
// packing  planes, trits or uneven
// picked   the columns of the layer that these are, rising; none where these are all
struct CodesGiven {
    Bytes2 codes;
    int bits, group;
    std::string kind;
    Bytes2 scales;
    float gain;
    std::optional<Bytes2> zeros;
    int zero;
    std::optional<Array<const uint8_t, 1>> table;
    std::optional<Array<const float, 1>> levels;
    int tall;
    float step;
    nanobind::handle shared, meaning, less;
    std::string packing;
    std::optional<Array<const int32_t, 1>> picked;
};
CodedParts take_codes(const CodesGiven &given, int rows, int columns);

// Throws std::invalid_argument for a packing that codes of their kind and bits do not have, or what is taken away from such codes.
void check_packing(const Coded &m);
// Takes the columns of a layer of `columns`, rising.
void take_picked(Coded &m, const Array<const int32_t, 1> &picked, int columns);

// How a model rounds inputs of `columns`: {"bits", "has_zero", "group", "kind"}, and {"scale", "zero"} where they are fixed.
Rounding take_rounding(const Part &part, int columns);
// Makes products with inputs of that rounding sums of whole numbers: of codes that are whole numbers, in groups that do not reach across
// those of the inputs and have not too many columns.
void sum_whole(Coded &m, const Rounding &rounding);

// The name of a kind of codes, and the kind of a name that is not of `whole` and `table`.
const char *code_kind_name(CodeKind kind);
CodeKind code_kind(const std::string &name);

// How many values a matrix must have of what its kind reads, for `bits`, `span`, `scales.each`, `which`, `books` and `word_bits`.
size_t own_count(const Coded &m);
size_t word_count(const Coded &m);

}  // namespace bitpress
