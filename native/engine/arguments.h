// What comes from Python, checked. Dictionaries are read by name; errors say which part is not what it must be, in one line: of another
// type (TypeError), missing or out of range (ValueError).
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bitpress {

template <typename T, int Dimensions>
using Array = nanobind::ndarray<T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

constexpr int MOST = 1 << 30;

inline void need(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(what);
}

inline int checked_threads(int threads) {
    need(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    return threads;
}

template <class A> bool is_matrix(const A &array, size_t rows, size_t columns) {
    return array.shape(0) == rows && array.shape(1) == columns;
}

[[noreturn]] inline void refuse(const std::string &part, const std::string &what) {
    throw std::invalid_argument(part + " must be " + what);
}

template <class T> T taken(nanobind::handle given, const std::string &part, const char *what, bool convert = true) {
    T value{};
    if (!nanobind::try_cast(given, value, convert)) throw nanobind::type_error((part + " must be " + what).c_str());
    return value;
}

inline std::vector<float> vector_of(nanobind::handle given, const std::string &part) {
    const auto array = taken<Array<const float, 1>>(given, part, "an array of float32 of one dimension");
    return {array.data(), array.data() + array.shape(0)};
}

struct Part {
    std::string name;
    nanobind::dict values;

    Part(std::string called, nanobind::handle given)
        : name(std::move(called)), values(taken<nanobind::dict>(given, name, "a dictionary")) {}

    std::string path(const char *key) const { return name + "." + key; }
    bool has(const char *key) const { return values.contains(key); }
    nanobind::object at(const char *key) const {
        if (!has(key)) throw std::invalid_argument(name + " lacks " + key);
        return values[key];
    }
    int whole(const char *key, int least, int most = MOST) const {
        const int value = taken<int>(at(key), path(key), "a whole number of 32 bits");
        if (value < least || value > most) refuse(path(key), std::to_string(least) + " to " + std::to_string(most));
        return value;
    }
    float number(const char *key) const {
        const float value = taken<float>(at(key), path(key), "a number");
        if (!std::isfinite(value)) refuse(path(key), "finite");
        return value;
    }
    bool claim(const char *key) const { return taken<bool>(at(key), path(key), "True or False"); }
    std::vector<float> vector(const char *key, int size, bool may_miss = false) const {
        const nanobind::object given = at(key);
        if (may_miss && given.is_none()) return {};
        std::vector<float> floats = vector_of(given, path(key));
        if (floats.size() != size_t(size)) refuse(path(key), "[" + std::to_string(size) + "]");
        return floats;
    }
    // An array as it is, not converted: [count].
    template <typename T> Array<const T, 1> array(const char *key, size_t count) const {
        auto given = taken<Array<const T, 1>>(at(key), path(key), "an array of its type, of one dimension and contiguous", false);
        if (given.shape(0) != count) refuse(path(key), "[" + std::to_string(count) + "]");
        return given;
    }
};

}  // namespace bitpress
