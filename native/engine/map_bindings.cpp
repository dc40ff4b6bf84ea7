// Python's door to maps by themselves: what a matrix is behind one, for steps of learning.
#include <nanobind/stl/string.h>

#include <algorithm>

#include "../share.h"
#include "aligned.h"
#include "arguments.h"
#include "bindings.h"
#include "kernels.h"

namespace nb = nanobind;

namespace bitpress {

namespace {

struct MatrixMap {
    const Kernels &kernels;
    const int size;
    const std::shared_ptr<const InputMap> map;

    MatrixMap(int length, nb::handle steps, const std::string &path)
        : kernels(choose_kernels(path.c_str())), size(checked(length)), map(InputMap::of(size, take_map(steps, "steps", size))) {
        need(map != nullptr, "a map needs steps");
    }

    static int checked(int length) {
        need(length >= 1 && length <= MOST, "the size must be positive");
        return length;
    }

    void map_row(const float *x, float *out, bool transposed) const {
        transposed ? map->apply_transposed(kernels, x, out) : map->apply(kernels, x, out);
    }

    void check(const Array<const float, 2> &x, const Array<float, 2> &out, int axis) const {
        need(x.shape(size_t(axis)) == size_t(size), "x must be of the map's size");
        need(is_matrix(out, x.shape(0), x.shape(1)), "out must be as x is");
        const float *from = x.data(), *to = out.data();
        need(to + out.size() <= from || from + x.size() <= to, "out must be another matrix than x");
    }

    void rows(Array<const float, 2> x, Array<float, 2> out, bool transposed, int threads) const {
        check(x, out, 1);
        const int used = checked_threads(threads);
        const nb::gil_scoped_release released;
        share(std::int64_t(x.shape(0)), size, used, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t r = first; r < last; ++r) map_row(x.data() + r * size, out.data() + r * size, transposed);
        });
    }

    // A strip of columns at a time is turned into rows and back.
    void columns(Array<const float, 2> x, Array<float, 2> out, bool transposed, int threads) const {
        check(x, out, 0);
        const int used = checked_threads(threads);
        const std::int64_t width = std::int64_t(x.shape(1)), strips = (width + STRIP - 1) / STRIP;
        const float *from = x.data();
        float *to = out.data();
        const nb::gil_scoped_release released;
        share(strips, std::int64_t(size) * STRIP, used, [&](std::int64_t first, std::int64_t last) {
            const size_t stride = size_t(size) + STRIP;  // columns of a power of two would share their places in the cache
            Aligned<float> before(stride * STRIP), after(stride * STRIP);
            for (std::int64_t strip = first; strip < last; ++strip) {
                const std::int64_t at = strip * STRIP;
                const size_t count = size_t(std::min<std::int64_t>(STRIP, width - at));
                for (size_t r = 0; r < size_t(size); ++r) {
                    for (size_t c = 0; c < count; ++c) before[c * stride + r] = from[std::int64_t(r) * width + at + std::int64_t(c)];
                }
                for (size_t c = 0; c < count; ++c) map_row(before.data() + c * stride, after.data() + c * stride, transposed);
                for (size_t r = 0; r < size_t(size); ++r) {
                    for (size_t c = 0; c < count; ++c) to[std::int64_t(r) * width + at + std::int64_t(c)] = after[c * stride + r];
                }
            }
        });
    }
};

}  // namespace

void bind_maps(nb::module_ &m) {
    nb::class_<MatrixMap>(m, "MatrixMap")
        .def(nb::init<int, nb::handle, const std::string &>(), nb::arg("size"), nb::arg("steps"), nb::arg("path"))
        .def("rows", &MatrixMap::rows, nb::arg("x").noconvert(), nb::arg("out").noconvert(), nb::arg("transposed"), nb::arg("threads"))
        .def("columns", &MatrixMap::columns, nb::arg("x").noconvert(), nb::arg("out").noconvert(), nb::arg("transposed"), nb::arg("threads"));
}

}  // namespace bitpress
