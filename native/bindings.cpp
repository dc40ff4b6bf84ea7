// Python's doors to the native library. Every shape and range is checked here, before a pointer is used.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "beams.h"
#include "codes.h"
#include "cpu.h"
#include "distance.h"
#include "engine/arguments.h"
#include "engine/bindings.h"
#include "feedback.h"
#include "gram.h"
#include "levels.h"
#include "search.h"
#include "trellis.h"

namespace nb = nanobind;

namespace {

using bitpress::Array, bitpress::need;

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;  // contiguous along the last axis only

int checked_threads(int threads) {
    need(threads >= 1 && threads <= 4096, "threads must be 1 to 4096");
    return threads;
}

using Vector = Array<const float, 1>;
using CodesOf = Array<const std::uint8_t, 1>;

bitpress::LevelTable checked_table(const Vector &boundaries, const Vector &levels, const CodesOf &code_of, int zero_code,
                                   int negative_zero_code) {
    need(boundaries.shape(0) <= 255 && levels.shape(0) == boundaries.shape(0) + 1, "at most 256 levels, one boundary less");
    need(code_of.shape(0) == levels.shape(0), "code_of must have one code a level");
    need(zero_code <= 255 && negative_zero_code <= 255, "a code is at most 255");
    return {boundaries.data(), static_cast<std::int64_t>(boundaries.shape(0)), levels.data(), code_of.data(), zero_code,
            negative_zero_code};
}

void round_columns(Array<float, 2> w, Array<std::uint8_t, 2> codes, Array<float, 2> errors, Rows factor,
                   Array<const float, 2> scale, std::optional<Array<const float, 2>> zero, float offset, int top,
                   std::optional<Vector> boundaries, std::optional<Vector> rising, std::optional<CodesOf> code_of, int zero_code,
                   int negative_zero_code, Array<const std::int64_t, 1> group, std::optional<Array<const float, 2>> least,
                   std::optional<Array<float, 2>> kept, int threads) {
    const auto cols = static_cast<std::int64_t>(w.shape(0)), rows = static_cast<std::int64_t>(w.shape(1));
    need(codes.shape(0) == w.shape(0) && codes.shape(1) == w.shape(1), "codes must have the shape of w");
    need(errors.shape(0) == w.shape(0) && errors.shape(1) == w.shape(1), "errors must have the shape of w");
    need(factor.shape(0) == w.shape(0) && factor.shape(1) == w.shape(0), "factor must be [cols, cols]");
    need(cols == 0 || factor.stride(1) == 1 || cols == 1, "factor must be contiguous along its rows");
    need(scale.shape(1) == w.shape(1), "scale must be [groups, rows]");
    need(!zero || (zero->shape(0) == scale.shape(0) && zero->shape(1) == scale.shape(1)), "zero must have the shape of scale");
    need(group.shape(0) == w.shape(0), "group must have one entry a column");
    need(top >= 0 && top <= 255, "top must be 0 to 255");
    need(least.has_value() == kept.has_value(), "least and kept go together");
    need(!least || (least->shape(0) == w.shape(0) && least->shape(1) == w.shape(1)), "least must have the shape of w");
    need(!kept || (kept->shape(0) == w.shape(0) && kept->shape(1) == w.shape(1)), "kept must have the shape of w");
    for (std::int64_t c = 0; c < cols; ++c)
        need(group(c) >= 0 && group(c) < static_cast<std::int64_t>(scale.shape(0)), "group holds an index out of range");
    need(boundaries.has_value() == rising.has_value() && rising.has_value() == code_of.has_value(), "a table has three parts");
    std::optional<bitpress::LevelTable> table;
    if (boundaries) table = checked_table(*boundaries, *rising, *code_of, zero_code, negative_zero_code);
    const bitpress::ColumnLevels levels{scale.data(), table ? &*table : nullptr, zero ? zero->data() : nullptr,
                                        offset,       static_cast<float>(top),   group.data()};
    const bitpress::KeptApart apart{least ? least->data() : nullptr, kept ? kept->data() : nullptr};
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::round_columns(w.data(), codes.data(), errors.data(), cols, rows, factor.data(), factor.stride(0), levels, apart,
                            used);
}

void add_gram(Array<float, 2> gram, Array<const std::int16_t, 2> x, int threads) {
    const auto padded = static_cast<std::int64_t>(gram.shape(0)), n = static_cast<std::int64_t>(x.shape(1));
    need(gram.shape(1) == gram.shape(0) && padded % 32 == 0, "gram must be square, its size a multiple of 32");
    need(n <= padded && n > padded - 32, "gram must be as large as x's channels, rounded up to a multiple of 32");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::add_gram(gram.data(), padded, reinterpret_cast<const std::uint16_t *>(x.data()),
                       static_cast<std::int64_t>(x.shape(0)), n, used);
}

void add_product(Array<float, 2> sum, Array<const std::int16_t, 2> a, Array<const std::int16_t, 2> b, int threads) {
    const auto padded = static_cast<std::int64_t>(sum.shape(0)), n = static_cast<std::int64_t>(a.shape(1));
    need(sum.shape(1) == sum.shape(0) && padded % 32 == 0, "sum must be square, its size a multiple of 32");
    need(n <= padded && n > padded - 32, "sum must be as large as a's channels, rounded up to a multiple of 32");
    need(b.shape(0) == a.shape(0) && b.shape(1) == a.shape(1), "a and b must have one shape");
    need(a.size() == 0 || a.data() != b.data(), "a and b must be two matrices; add_gram takes one");
    if (a.size() == 0) return;
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::add_product(sum.data(), padded, reinterpret_cast<const std::uint16_t *>(a.data()),
                          reinterpret_cast<const std::uint16_t *>(b.data()), static_cast<std::int64_t>(a.shape(0)), n, used);
}

using Floats = Array<const float, 2>;
using Codes = Array<std::uint8_t, 2>;
using ConstCodes = Array<const std::uint8_t, 2>;

bitpress::AffineBlocks affine(std::size_t blocks, const Vector &scale, const std::optional<Vector> &zero, float offset, int top) {
    need(scale.shape(0) == blocks, "scale must have one value a block");
    need(!zero || zero->shape(0) == blocks, "zero must have one value a block");
    need(top >= 0 && top <= 255, "top must be 0 to 255");
    return {scale.data(), zero ? zero->data() : nullptr, offset, static_cast<float>(top)};
}

template <typename A, typename B>
void need_same_shape(const A &a, const B &b) {
    need(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1), "the two arrays must have one shape");
}

void encode_affine(Floats values, Codes codes, Vector scale, std::optional<Vector> zero, float offset, int top, int threads) {
    need_same_shape(values, codes);
    const auto levels = affine(values.shape(0), scale, zero, offset, top);
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::encode_affine(values.data(), codes.data(), static_cast<std::int64_t>(values.shape(0)),
                            static_cast<std::int64_t>(values.shape(1)), levels, used);
}

void decode_affine(ConstCodes codes, Array<float, 2> values, Vector scale, std::optional<Vector> zero, float offset, int threads) {
    need_same_shape(values, codes);
    const auto levels = affine(values.shape(0), scale, zero, offset, 0);
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::decode_affine(codes.data(), values.data(), static_cast<std::int64_t>(values.shape(0)),
                            static_cast<std::int64_t>(values.shape(1)), levels, used);
}

bool search_ranges(Floats values, std::optional<Floats> importance, Vector ratios, int top, Array<float, 1> scale,
                   std::optional<Array<float, 1>> zero, int type, std::optional<Vector> steps, int most, int threads) {
    need(!importance || (importance->shape(0) == values.shape(0) && importance->shape(1) == values.shape(1)),
         "importance must have the shape of the values");
    need(ratios.shape(0) >= 1, "there must be a ratio");
    need(top >= (zero ? 1 : 3) && top <= 255, "top must be 1 to 255, 3 at least without a zero point");
    need(scale.shape(0) == values.shape(0), "scale must have one value a block");
    need(!zero || zero->shape(0) == values.shape(0), "zero must have one value a block");
    need(type >= 0 && type <= 3, "type must be 0 (fp16), 1 (bf16), 2 (fp32) or 3 (steps)");
    need((type == 3) == steps.has_value() && (!steps || steps->shape(0) == values.shape(0)), "steps must have one value a block");
    need(!steps || (most >= 1 && most <= 65535), "most must be 1 to 65535");
    const bitpress::RangeSearch search{values.data(), importance ? importance->data() : nullptr,
                                       static_cast<std::int64_t>(values.shape(0)), static_cast<std::int64_t>(values.shape(1)),
                                       ratios.data(), static_cast<std::int64_t>(ratios.shape(0)), top, zero.has_value(),
                                       static_cast<bitpress::ScaleType>(type), steps ? steps->data() : nullptr, most};
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    return bitpress::search_ranges(search, scale.data(), zero ? zero->data() : nullptr, used);
}

void search_scales(Floats values, std::optional<Floats> importance, Floats trials, Vector boundaries, Vector levels, CodesOf code_of,
                   int zero_code, int negative_zero_code, Array<float, 1> scale, int threads) {
    need(!importance || (importance->shape(0) == values.shape(0) && importance->shape(1) == values.shape(1)),
         "importance must have the shape of the values");
    need(trials.shape(0) >= 1 && trials.shape(1) == values.shape(0), "trials must be [trials, blocks], one at least");
    need(scale.shape(0) == values.shape(0), "scale must have one value a block");
    const auto table = checked_table(boundaries, levels, code_of, zero_code, negative_zero_code);
    const bitpress::ScaleSearch search{values.data(), importance ? importance->data() : nullptr,
                                       static_cast<std::int64_t>(values.shape(0)), static_cast<std::int64_t>(values.shape(1)),
                                       trials.data(), static_cast<std::int64_t>(trials.shape(0))};
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::search_scales(search, table, scale.data(), used);
}

bitpress::Books checked_books(const Floats &vectors, const Array<const float, 3> &words, const Array<std::int64_t, 2> &codes) {
    need(words.shape(0) >= 1 && words.shape(1) >= 1 && words.shape(2) >= 1, "there must be a book, a word and a number in it");
    need(vectors.shape(1) == words.shape(2), "vectors must be as long as words");
    need(codes.shape(0) == words.shape(0) && codes.shape(1) == vectors.shape(0), "codes must be [books, vectors]");
    return {words.data(), static_cast<std::int64_t>(words.shape(0)), static_cast<std::int64_t>(words.shape(1)),
            static_cast<std::int64_t>(words.shape(2))};
}

void beam_search(Floats vectors, Array<const float, 3> words, std::int64_t width, Array<std::int64_t, 2> codes, int threads) {
    const bitpress::Books books = checked_books(vectors, words, codes);
    need(width >= 1 && width <= 4096, "width must be 1 to 4096");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::beam_search(vectors.data(), static_cast<std::int64_t>(vectors.shape(0)), books, width, codes.data(), used);
}

void nearest_pairs(Floats vectors, Array<const float, 3> words, Array<std::int64_t, 2> codes, int threads) {
    const bitpress::Books books = checked_books(vectors, words, codes);
    need(words.shape(0) == 2 && words.shape(1) <= 4096, "there must be two books of at most 4096 words");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::nearest_pairs(vectors.data(), static_cast<std::int64_t>(vectors.shape(0)), books, codes.data(), used);
}

void encode_levels(Floats values, Codes codes, Vector scale, Vector boundaries, Vector levels, CodesOf code_of, int zero_code,
                   int negative_zero_code, int threads) {
    need_same_shape(values, codes);
    need(scale.shape(0) == values.shape(0), "scale must have one value a block");
    const auto table = checked_table(boundaries, levels, code_of, zero_code, negative_zero_code);
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::encode_levels(values.data(), codes.data(), static_cast<std::int64_t>(values.shape(0)),
                            static_cast<std::int64_t>(values.shape(1)), scale.data(), table, used);
}

void decode_levels(ConstCodes codes, Array<float, 2> values, Vector scale, Vector table, int threads) {
    need_same_shape(values, codes);
    need(scale.shape(0) == values.shape(0), "scale must have one value a block");
    need(table.shape(0) == 256, "the table must have 256 levels");
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::decode_levels(codes.data(), values.data(), static_cast<std::int64_t>(values.shape(0)),
                            static_cast<std::int64_t>(values.shape(1)), scale.data(), table.data(), used);
}

void check_dense(std::size_t rows, std::size_t count, const ConstCodes &packed, int bits) {
    need(bits >= 1 && bits <= 8, "bits must be 1 to 8");
    need(packed.shape(0) == rows && packed.shape(1) == (count * static_cast<std::size_t>(bits) + 7) / 8,
         "packed must have ceil(count * bits / 8) bytes a row");
}

void pack_dense(ConstCodes codes, Codes packed, int bits, int threads) {
    check_dense(codes.shape(0), codes.shape(1), ConstCodes(packed), bits);
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::pack_dense(codes.data(), packed.data(), static_cast<std::int64_t>(codes.shape(0)),
                         static_cast<std::int64_t>(codes.shape(1)), bits, used);
}

void unpack_dense(ConstCodes packed, Codes codes, int bits, int threads) {
    check_dense(codes.shape(0), codes.shape(1), packed, bits);
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::unpack_dense(packed.data(), codes.data(), static_cast<std::int64_t>(codes.shape(0)),
                           static_cast<std::int64_t>(codes.shape(1)), bits, used);
}

int compare_rows(nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> p, nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> q,
                 Array<const std::int64_t, 1> following, Array<double, 2> figures, int threads) {
    need(p.dtype() == q.dtype() && (p.dtype() == nb::dtype<float>() || p.dtype() == nb::dtype<std::int16_t>()),
         "p and q must both be float32 or both the bits of bfloat16 as int16");
    need_same_shape(p, q);
    const auto rows = static_cast<std::int64_t>(p.shape(0)), vocabulary = static_cast<std::int64_t>(p.shape(1));
    need(vocabulary >= 1, "the vocabulary must not be empty");
    need(following.shape(0) == p.shape(0), "following must have one token a row");
    need(figures.shape(0) == p.shape(0) && figures.shape(1) == bitpress::ROW_FIGURES, "figures must be [rows, 4]");
    for (std::int64_t i = 0; i < rows; ++i) need(following(i) >= -1 && following(i) < vocabulary, "following holds a token out of range");
    const int used = checked_threads(threads);
    const bool floats = p.dtype() == nb::dtype<float>();
    const void *a = p.data(), *b = q.data();
    const nb::gil_scoped_release released;
    if (floats) {
        return bitpress::compare_rows(static_cast<const float *>(a), static_cast<const float *>(b), following.data(), figures.data(), rows,
                                      vocabulary, used);
    }
    return bitpress::compare_rows(static_cast<const std::uint16_t *>(a), static_cast<const std::uint16_t *>(b), following.data(),
                                  figures.data(), rows, vocabulary, used);
}

void encode_trellis(Floats values, std::optional<Floats> weights, Codes codes, int state_bits, Array<const std::int32_t, 1> shifts,
                    Vector levels, int threads) {
    need_same_shape(values, codes);
    need(!weights || (weights->shape(0) == values.shape(0) && weights->shape(1) == values.shape(1)),
         "weights must have the shape of the values");
    need(shifts.shape(0) >= 1, "there must be a shift");
    int most = 0;
    for (std::size_t i = 0; i < shifts.shape(0); ++i) {
        need(shifts(i) >= 1 && shifts(i) <= bitpress::kMostShift, "a shift must be 1 to 8");
        most = std::max(most, static_cast<int>(shifts(i)));
    }
    need(state_bits >= most + 3 && state_bits <= 20, "state_bits must be 3 more than the largest shift, and 20 at most");
    need(levels.shape(0) == std::size_t{1} << state_bits, "there must be a level for every state");
    const bitpress::Trellis trellis{state_bits, shifts.data(), static_cast<int>(shifts.shape(0)), levels.data()};
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::encode_trellis(values.data(), weights ? weights->data() : nullptr, codes.data(),
                             static_cast<std::int64_t>(values.shape(0)), static_cast<std::int64_t>(values.shape(1)), trellis, used);
}

std::vector<std::string> features() {
    std::vector<std::string> names;
    if (bitpress::has_avx512()) names.emplace_back("avx512");
    if (bitpress::has_amx_bf16()) names.emplace_back("amx-bf16");
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native code of bitpress; see bitpress.native for the typed doors.";
    m.attr("version") = 23;  // as in bitpress.library
    m.def("features", &features);
    // noconvert: an array of another type or layout is refused; a converted copy would take the results with it.
    m.def("round_columns", &round_columns, nb::arg("w").noconvert(), nb::arg("codes").noconvert(), nb::arg("errors").noconvert(),
          nb::arg("factor").noconvert(), nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(), nb::arg("offset"),
          nb::arg("top"), nb::arg("boundaries").noconvert().none(), nb::arg("levels").noconvert().none(),
          nb::arg("code_of").noconvert().none(), nb::arg("zero_code"), nb::arg("negative_zero_code"), nb::arg("group").noconvert(),
          nb::arg("least").noconvert().none(), nb::arg("kept").noconvert().none(), nb::arg("threads"));
    m.def("add_gram", &add_gram, nb::arg("gram").noconvert(), nb::arg("x").noconvert(), nb::arg("threads"));
    m.def("add_product", &add_product, nb::arg("sum").noconvert(), nb::arg("a").noconvert(), nb::arg("b").noconvert(),
          nb::arg("threads"));
    m.def("encode_affine", &encode_affine, nb::arg("values").noconvert(), nb::arg("codes").noconvert(),
          nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(), nb::arg("offset"), nb::arg("top"), nb::arg("threads"));
    m.def("decode_affine", &decode_affine, nb::arg("codes").noconvert(), nb::arg("values").noconvert(),
          nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(), nb::arg("offset"), nb::arg("threads"));
    m.def("search_ranges", &search_ranges, nb::arg("values").noconvert(), nb::arg("importance").noconvert().none(),
          nb::arg("ratios").noconvert(), nb::arg("top"), nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(),
          nb::arg("type"), nb::arg("steps").noconvert().none(), nb::arg("most"), nb::arg("threads"));
    m.def("search_scales", &search_scales, nb::arg("values").noconvert(), nb::arg("importance").noconvert().none(),
          nb::arg("trials").noconvert(), nb::arg("boundaries").noconvert(), nb::arg("levels").noconvert(),
          nb::arg("code_of").noconvert(), nb::arg("zero_code"), nb::arg("negative_zero_code"), nb::arg("scale").noconvert(),
          nb::arg("threads"));
    m.def("beam_search", &beam_search, nb::arg("vectors").noconvert(), nb::arg("words").noconvert(), nb::arg("width"),
          nb::arg("codes").noconvert(), nb::arg("threads"));
    m.def("nearest_pairs", &nearest_pairs, nb::arg("vectors").noconvert(), nb::arg("words").noconvert(),
          nb::arg("codes").noconvert(), nb::arg("threads"));
    m.def("encode_levels", &encode_levels, nb::arg("values").noconvert(), nb::arg("codes").noconvert(),
          nb::arg("scale").noconvert(), nb::arg("boundaries").noconvert(), nb::arg("levels").noconvert(),
          nb::arg("code_of").noconvert(), nb::arg("zero_code"), nb::arg("negative_zero_code"), nb::arg("threads"));
    m.def("decode_levels", &decode_levels, nb::arg("codes").noconvert(), nb::arg("values").noconvert(),
          nb::arg("scale").noconvert(), nb::arg("table").noconvert(), nb::arg("threads"));
    m.def("pack_dense", &pack_dense, nb::arg("codes").noconvert(), nb::arg("packed").noconvert(), nb::arg("bits"),
          nb::arg("threads"));
    m.def("unpack_dense", &unpack_dense, nb::arg("packed").noconvert(), nb::arg("codes").noconvert(), nb::arg("bits"),
          nb::arg("threads"));
    m.def("encode_trellis", &encode_trellis, nb::arg("values").noconvert(), nb::arg("weights").noconvert().none(),
          nb::arg("codes").noconvert(), nb::arg("state_bits"), nb::arg("shifts").noconvert(), nb::arg("levels").noconvert(),
          nb::arg("threads"));
    m.def("compare_rows", &compare_rows, nb::arg("p").noconvert(), nb::arg("q").noconvert(), nb::arg("following").noconvert(),
          nb::arg("figures").noconvert(), nb::arg("threads"));
    bitpress::bind_engine(m);
}
