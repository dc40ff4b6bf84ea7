// Python's doors to the native library. Every shape and range is checked here, before a pointer is used.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "feedback.h"
#include "gram.h"

namespace nb = nanobind;

namespace {

template <typename T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;  // contiguous along the last axis only

void need(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(what);
}

int checked_threads(int threads) {
    need(threads >= 1 && threads <= 4096, "threads must be 1 to 4096");
    return threads;
}

void round_columns(Array<float, 2> w, Array<std::uint8_t, 2> codes, Array<float, 2> errors, Rows factor,
                   Array<const float, 2> scale, std::optional<Array<const float, 2>> zero, float offset, int top,
                   Array<const std::int64_t, 1> group, int threads) {
    const auto cols = static_cast<std::int64_t>(w.shape(0)), rows = static_cast<std::int64_t>(w.shape(1));
    need(codes.shape(0) == w.shape(0) && codes.shape(1) == w.shape(1), "codes must have the shape of w");
    need(errors.shape(0) == w.shape(0) && errors.shape(1) == w.shape(1), "errors must have the shape of w");
    need(factor.shape(0) == w.shape(0) && factor.shape(1) == w.shape(0), "factor must be [cols, cols]");
    need(cols == 0 || factor.stride(1) == 1 || cols == 1, "factor must be contiguous along its rows");
    need(scale.shape(1) == w.shape(1), "scale must be [groups, rows]");
    need(!zero || (zero->shape(0) == scale.shape(0) && zero->shape(1) == scale.shape(1)), "zero must have the shape of scale");
    need(group.shape(0) == w.shape(0), "group must have one entry a column");
    need(top >= 0 && top <= 255, "top must be 0 to 255");
    for (std::int64_t c = 0; c < cols; ++c)
        need(group(c) >= 0 && group(c) < static_cast<std::int64_t>(scale.shape(0)), "group holds an index out of range");
    const bitpress::AffineColumns levels{scale.data(), zero ? zero->data() : nullptr, offset, static_cast<float>(top), group.data()};
    const int used = checked_threads(threads);
    const nb::gil_scoped_release released;
    bitpress::round_columns(w.data(), codes.data(), errors.data(), cols, rows, factor.data(), factor.stride(0), levels, used);
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

std::vector<std::string> features() {
    std::vector<std::string> names;
    if (bitpress::has_avx512()) names.emplace_back("avx512");
    if (bitpress::has_amx_bf16()) names.emplace_back("amx-bf16");
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native code of bitpress; see bitpress.native for the typed doors.";
    m.def("features", &features);
    // noconvert: an array of another type or layout is refused; a converted copy would take the results with it.
    m.def("round_columns", &round_columns, nb::arg("w").noconvert(), nb::arg("codes").noconvert(), nb::arg("errors").noconvert(),
          nb::arg("factor").noconvert(), nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(), nb::arg("offset"),
          nb::arg("top"), nb::arg("group").noconvert(), nb::arg("threads"));
    m.def("add_gram", &add_gram, nb::arg("gram").noconvert(), nb::arg("x").noconvert(), nb::arg("threads"));
}
