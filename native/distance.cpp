#include "distance.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "vector_units.h"

namespace bitpress {

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 64 * LANES;  // logits summed in single precision before the sums go on in double
constexpr std::uint32_t INFINITE = 0x7f800000;

#define INLINE inline __attribute__((always_inline))

INLINE std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

INLINE float value(float x) { return x; }
INLINE float value(std::uint16_t x) { return float_of(std::uint32_t(x) << 16); }

// e^x for x up to 0, within 2e-7 of it, 0 from -87 down: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
INLINE float exponential(float x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added and taken away, it leaves a whole number
    const float seen = x < -87.0f ? -87.0f : x;
    const float shifted = seen * 1.44269504f + ROUND;
    const float n = shifted - ROUND;
    float r = seen + n * -0.693359375f;
    r = r + n * 2.12194440e-4f;
    float s = 1.9875691500e-4f;
    s = s * r + 1.3981999507e-3f;
    s = s * r + 8.3334519073e-3f;
    s = s * r + 4.1665795894e-2f;
    s = s * r + 1.6666665459e-1f;
    s = s * r + 5.0000001201e-1f;
    s = s * (r * r) + (r + 1.0f);
    const float scaled = s * float_of((bits_of(shifted) - bits_of(ROUND) + 127) << 23);
    return x < -87.0f ? 0.0f : scaled;
}

// The largest logit, the first place that has it, and whether all are finite.
struct Top {
    float most;
    std::int64_t place;
    bool finite;
};

template <typename T> INLINE Top find_top(const T *x, std::int64_t n) {
    float most[LANES];
    std::uint32_t widest[LANES] = {};
    for (int j = 0; j < LANES; ++j) most[j] = -INFINITY;
    std::int64_t at = 0;
    for (; at + LANES <= n; at += LANES) {
        for (int j = 0; j < LANES; ++j) {
            const float v = value(x[at + j]);
            const std::uint32_t size = bits_of(v) & INFINITE;
            most[j] = v > most[j] ? v : most[j];
            widest[j] = size > widest[j] ? size : widest[j];
        }
    }
    for (int j = 0; at < n; ++at, ++j) {
        const float v = value(x[at]);
        const std::uint32_t size = bits_of(v) & INFINITE;
        most[j] = v > most[j] ? v : most[j];
        widest[j] = size > widest[j] ? size : widest[j];
    }
    Top top{-INFINITY, 0, true};
    for (int j = 0; j < LANES; ++j) {
        top.most = most[j] > top.most ? most[j] : top.most;
        top.finite = top.finite && widest[j] != INFINITE;
    }
    while (top.finite && value(x[top.place]) != top.most) ++top.place;
    return top;
}

// Sums of e^(p - top), of e^(q - top), and of e^(p - top) (p - q), where p and q are logits behind their tops.
struct Sums {
    double p = 0, q = 0, cross = 0;
};

template <typename T> INLINE Sums sum_rows(const T *p, const T *q, float top_p, float top_q, std::int64_t n) {
    Sums sums;
    for (std::int64_t block = 0; block < n; block += BLOCK) {
        const std::int64_t end = block + BLOCK < n ? block + BLOCK : n;
        float of_p[LANES] = {}, of_q[LANES] = {}, of_cross[LANES] = {};
        std::int64_t at = block;
        for (; at + LANES <= end; at += LANES) {
            for (int j = 0; j < LANES; ++j) {
                const float a = value(p[at + j]) - top_p, b = value(q[at + j]) - top_q;
                const float e = exponential(a);
                of_p[j] += e;
                of_q[j] += exponential(b);
                of_cross[j] += e * (a - b);
            }
        }
        for (int j = 0; at < end; ++at, ++j) {
            const float a = value(p[at]) - top_p, b = value(q[at]) - top_q;
            const float e = exponential(a);
            of_p[j] += e;
            of_q[j] += exponential(b);
            of_cross[j] += e * (a - b);
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
