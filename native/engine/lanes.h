// Sixteen rows at a time: bytes, 32-bit integers and floats of one strip, on the vector unit that this file is compiled for.
//
// Included by one source file per code path, which defines BITPRESS_PATH; everything lands in that path's own namespace, because
// the linker would otherwise merge functions that were compiled for different processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "halves.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX2__) && !defined(BITPRESS_SANITIZE)
#define FLAT __attribute__((always_inline))
#else
#define FLAT  // the portable loops would fill the instruction cache, and the compiler's day
#endif
#define INLINE inline FLAT

namespace bitpress::BITPRESS_PATH {

#if defined(__AVX512VNNI__)
#include "lanes_avx512.inc"
#elif defined(__AVX2__)
#include "lanes_avx2.inc"
#else
#include "lanes_portable.inc"
#endif

// Signed bytes with so much added, as unsigned ones.
template <int MORE> INLINE Bytes lifted(const int8_t *p) {
    const Bytes x = load_bytes(reinterpret_cast<const uint8_t *>(p));
#if defined(__AVX512VNNI__)
    return {_mm512_add_epi8(x.v, _mm512_set1_epi8(char(MORE)))};
#elif defined(__AVX2__)
    const __m256i more = _mm256_set1_epi8(char(MORE));
    return {_mm256_add_epi8(x.a, more), _mm256_add_epi8(x.b, more)};
#else
    Bytes y;
    for (int i = 0; i < 64; ++i) y.v[i] = uint8_t(x.v[i] + MORE);
    return y;
#endif
}

// bf16 in the upper halves, rounded to nearest.
INLINE Ints upper_halves(Floats x) { return float_bits(x) + set_ints(0x8000); }

// 1 / x for normal x, to the last bit or two.
INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512VNNI__)
    const __m512 guess = _mm512_rcp14_ps(x.v);
    return {_mm512_mul_ps(guess, _mm512_fnmadd_ps(x.v, guess, _mm512_set1_ps(2.0f)))};
#else
    return set_floats(1.0f) / x;
#endif
}

// e^x for x from -87 to 88, within 2e-7 of it: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
INLINE Floats exponential(Floats x) {
    x = min(max(x, set_floats(-87.0f)), set_floats(88.0f));
    const Ints n = to_ints(x * set_floats(1.44269504f));
    const Floats whole = to_floats(n);
    Floats r = fma(whole, set_floats(-0.693359375f), x);
    r = fma(whole, set_floats(2.12194440e-4f), r);
    Floats p = set_floats(1.9875691500e-4f);
    p = fma(p, r, set_floats(1.3981999507e-3f));
    p = fma(p, r, set_floats(8.3334519073e-3f));
    p = fma(p, r, set_floats(4.1665795894e-2f));
    p = fma(p, r, set_floats(1.6666665459e-1f));
    p = fma(p, r, set_floats(5.0000001201e-1f));
    p = fma(p, r * r, r + set_floats(1.0f));
    return p * bits_to_floats(shift_left_ints(n + set_ints(127), 23));
}

// silu(x) = x / (1 + e^-x); the tanh form of gelu is x / (1 + e^-2y) with y = sqrt(2 / pi) (x + 0.044715 x^3).
INLINE Floats activated(Floats x, bool tanh_gelu) {
    Floats y = x;
    if (tanh_gelu) y = x * set_floats(1.5957691216f) * fma(x * x, set_floats(0.044715f), set_floats(1.0f));
    return x * reciprocal(set_floats(1.0f) + exponential(zero_floats() - y));
}

}  // namespace bitpress::BITPRESS_PATH
