#include "distance.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu.h"
#include "vector_units.h"

// Vectors are passed between functions that are all inlined, so that no calling convention is concerned.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace bitpress {

namespace {

constexpr int LANES = 16;
constexpr std::int64_t BLOCK = 64 * LANES;  // logits summed in single precision before the sums go on in double

#define INLINE inline __attribute__((always_inline))

// Vectors of the compiler's own kind: it makes whole registers of them where loops over lanes stay scalar.
using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = std::uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = std::uint16_t __attribute__((vector_size(2 * LANES)));

template <typename To, typename From> INLINE To as(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Floats every(float x) { return x - Floats{}; }

INLINE float value(float x) { return x; }
INLINE float value(std::uint16_t x) { return as<float>(std::uint32_t(x) << 16); }

INLINE Floats load(const float *x) {
    Floats values;
    std::memcpy(&values, x, sizeof values);
    return values;
}

INLINE Floats load(const std::uint16_t *x) {
    Halves halves;
    std::memcpy(&halves, x, sizeof halves);
    return as<Floats>(__builtin_convertvector(halves, Words) << 16);
}

// Sixteen logits less `top`; where only `left` of them are still of the row, `beyond` in the places after those.
template <typename T> INLINE Floats load(const T *x, std::int64_t left, float top, float beyond) {
    if (left >= LANES) return load(x) - top;
    float values[LANES];
    for (int j = 0; j < LANES; ++j) values[j] = j < left ? value(x[j]) - top : beyond;
    return load(values);
}

// e^x for x up to 0, within 2e-7 of it, 0 from -87 down: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
INLINE Floats exponential(Floats x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added and taken away, it leaves a whole number
    const auto low = x < -87.0f;
    const Floats seen = low ? every(-87.0f) : x;
    const Floats shifted = seen * 1.44269504f + ROUND;
    const Floats n = shifted - ROUND;
    Floats r = seen + n * -0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats s = every(1.9875691500e-4f);
    s = s * r + 1.3981999507e-3f;
    s = s * r + 8.3334519073e-3f;
    s = s * r + 4.1665795894e-2f;
    s = s * r + 1.6666665459e-1f;
    s = s * r + 5.0000001201e-1f;
    s = s * (r * r) + (r + 1.0f);
    const Floats scaled = s * as<Floats>((as<Words>(shifted) - as<std::uint32_t>(ROUND) + 127) << 23);
    return low ? Floats{} : scaled;
}

// The largest logit, the first place that has it, and whether all are finite.
struct Top {
    float most;
    std::int64_t place;
    bool finite;
};

template <typename T> INLINE Top find_top(const T *x, std::int64_t n) {
    Floats most = every(-INFINITY);
    Words place{}, size{};  // in steps of LANES; the largest magnitude's bits
    for (std::int64_t at = 0; at < n; at += LANES) {
        const Floats v = load(x + at, n - at, 0.0f, std::numeric_limits<float>::lowest());
        const Words bits = as<Words>(v) & 0x7fffffffu;
        const auto more = v > most;
        most = more ? v : most;
        place = more ? Words{} + static_cast<std::uint32_t>(at / LANES) : place;
        size = bits > size ? bits : size;
    }
    Top top{-INFINITY, n, true};
    for (int j = 0; j < LANES; ++j) {
        const std::int64_t here = static_cast<std::int64_t>(place[j]) * LANES + j;
        if (here < n && (most[j] > top.most || (most[j] == top.most && here < top.place))) top.most = most[j], top.place = here;
        top.finite = top.finite && size[j] < 0x7f800000u;
    }
    return top;
}

// Sums of e^(p - top), of e^(q - top), and of e^(p - top) (p - q), where p and q are logits behind their tops.
struct Sums {
    double p = 0, q = 0, cross = 0;
};

template <typename T> INLINE Sums sum_rows(const T *p, const T *q, float top_p, float top_q, std::int64_t n) {
    Sums sums;
    for (std::int64_t block = 0; block < n; block += BLOCK) {
        const std::int64_t end = std::min(block + BLOCK, n);
        Floats of_p{}, of_q{}, of_cross{};
        for (std::int64_t at = block; at < end; at += LANES) {
            const Floats a = load(p + at, end - at, top_p, -100.0f), b = load(q + at, end - at, top_q, -100.0f);  // e^-100 is 0 here
            const Floats e = exponential(a);
            of_p += e;
            of_q += exponential(b);
            of_cross += e * (a - b);
        }
        for (int j = 0; j < LANES; ++j) sums.p += double(of_p[j]), sums.q += double(of_q[j]), sums.cross += double(of_cross[j]);
    }
    return sums;
}

template <typename T> INLINE int compare_row(const T *p, const T *q, std::int64_t following, double *figures, std::int64_t n) {
    const Top top_p = find_top(p, n), top_q = find_top(q, n);
    if (!top_p.finite || !top_q.finite) return (top_p.finite ? 0 : 1) + (top_q.finite ? 0 : 2);
    const Sums sums = sum_rows(p, q, top_p.most, top_q.most, n);
    const double log_p = std::log(sums.p), log_q = std::log(sums.q);
    figures[KL] = sums.cross / sums.p - log_p + log_q;
    figures[AGREES] = top_p.place == top_q.place ? 1 : 0;
    figures[NLL_P] = following < 0 ? 0 : log_p - (double(value(p[following])) - double(top_p.most));
    figures[NLL_Q] = following < 0 ? 0 : log_q - (double(value(q[following])) - double(top_q.most));
    return 0;
}

EVERY_VECTOR_UNIT int compare_range(const float *p, const float *q, const std::int64_t *following, double *figures, std::int64_t first,
                                    std::int64_t last, std::int64_t n) {
    int bad = 0;
    for (std::int64_t i = first; i < last; ++i) bad |= compare_row(p + i * n, q + i * n, following[i], figures + i * ROW_FIGURES, n);
    return bad;
}

EVERY_VECTOR_UNIT int compare_range(const std::uint16_t *p, const std::uint16_t *q, const std::int64_t *following, double *figures,
                                    std::int64_t first, std::int64_t last, std::int64_t n) {
    int bad = 0;
    for (std::int64_t i = first; i < last; ++i) bad |= compare_row(p + i * n, q + i * n, following[i], figures + i * ROW_FIGURES, n);
    return bad;
}

}  // namespace

template <typename T>
int compare_rows(const T *p, const T *q, const std::int64_t *following, double *figures, std::int64_t rows, std::int64_t vocabulary,
                 int threads) {
    const std::int64_t used = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, rows));
    std::atomic<int> bad{0};
    parallel(static_cast<int>(used), [&](int t) {
        bad |= compare_range(p, q, following, figures, rows * t / used, rows * (t + 1) / used, vocabulary);
    });
    return bad;
}

template int compare_rows(const float *, const float *, const std::int64_t *, double *, std::int64_t, std::int64_t, int);
template int compare_rows(const std::uint16_t *, const std::uint16_t *, const std::int64_t *, double *, std::int64_t, std::int64_t, int);

}  // namespace bitpress
