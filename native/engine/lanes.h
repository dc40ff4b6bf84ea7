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

struct Bytes { __m512i v; };   // 16 rows x 4 columns
struct Ints { __m512i v; };    // 16 rows
struct Floats { __m512 v; };   // 16 rows

INLINE Bytes load_bytes(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
INLINE void store(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a.v); }
template <int N> INLINE Bytes shift_right(Bytes a) {
    if constexpr (N == 0) return a;
    else return {_mm512_srli_epi32(a.v, N)};
}
template <int N> INLINE Bytes shift_left(Bytes a) {
    if constexpr (N == 0) return a;
    else return {_mm512_slli_epi32(a.v, N)};
}
template <int M> INLINE Bytes mask(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(M)))}; }
// a | (b & M)
template <int M> INLINE Bytes merge(Bytes a, Bytes b) {
    return {_mm512_ternarylogic_epi32(a.v, b.v, _mm512_set1_epi8(char(M)), 0xf8)};
}
struct ByteTable { __m512i v; };
INLINE ByteTable load_table(const uint8_t *p) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
}
INLINE Bytes look_up(ByteTable t, Bytes codes) { return {_mm512_shuffle_epi8(t.v, codes.v)}; }

INLINE Ints zero_ints() { return {_mm512_setzero_si512()}; }
INLINE Ints load_u8(const uint8_t *p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
}
INLINE Ints load_ints(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
INLINE void store(int32_t *p, Ints a) { _mm512_storeu_si512(p, a.v); }
INLINE Ints set_ints(int x) { return {_mm512_set1_epi32(x)}; }
INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
// acc + unsigned bytes . four signed bytes of every row alike
INLINE Ints dot(Ints acc, Bytes u, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(acc.v, u.v, _mm512_set1_epi32(four))};
}
// The same where every unsigned byte is below 128, or no signed one beyond 64.
INLINE Ints dot_small(Ints acc, Bytes u, const int8_t *x) { return dot(acc, u, x); }
// one of the four columns, as integers
template <int J> INLINE Ints column(Bytes a) {
    if constexpr (J == 3) return {_mm512_srli_epi32(a.v, 24)};
    else return {_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * J), _mm512_set1_epi32(255))};
}

INLINE Floats zero_floats() { return {_mm512_setzero_ps()}; }
INLINE Floats set_floats(float x) { return {_mm512_set1_ps(x)}; }
INLINE Floats load_floats(const float *p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float *p, Floats a) { _mm512_storeu_ps(p, a.v); }
INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, halves to even
INLINE Floats bits_to_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
INLINE Ints float_bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
// The upper halves of 16 integers in order, and of two times 16 side by side: the first in the lower half.
INLINE void store_upper(uint16_t *p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)));
}
INLINE void store_uppers(uint16_t *p, Ints a, Ints b) {
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a.v, 16), b.v));
}
INLINE Ints shift_left_ints(Ints a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
// Which of 16 magnitudes are above a bound, and the numbers with zeros in the place of those.
INLINE unsigned above(Floats a, Floats bound) { return _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), bound.v, _CMP_GT_OQ); }
INLINE Floats without(Floats a, Floats bound) {
    return {_mm512_maskz_mov_ps(__mmask16(~above(a, bound)), a.v)};
}
INLINE Floats load_f16(const uint16_t *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
INLINE Floats load_bf16(const uint16_t *p) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16))};
}
INLINE Floats load_i8(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}
INLINE void store_i8(int8_t *p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(a.v));
}
INLINE void store_f16(uint16_t *p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
struct LevelTable { __m512 v; };
INLINE LevelTable load_levels(const float *p) { return {_mm512_loadu_ps(p)}; }
INLINE Floats look_up(LevelTable t, Ints codes) { return {_mm512_permutexvar_ps(codes.v, t.v)}; }
INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
INLINE int sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

// (bytes - zero) * factor, rounded, as signed bytes: factors are 16-bit fixed point, `shift` places of it before the point.
struct Factor { __m512i even, odd; };
INLINE Factor load_factor(const int16_t *p) {
    const __m512i m = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    const __m512i both = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
    return {both, both};
}
INLINE Bytes spread_bytes(const uint8_t *p) {  // 16 bytes, each to the four columns of its row
    const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return {_mm512_shuffle_epi8(z, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0))};
}
INLINE Bytes rescale(Bytes codes, Bytes zero, Factor f, int shift) {
    const __m512i low = _mm512_set1_epi16(255);
    const __m512i even = _mm512_sub_epi16(_mm512_and_si512(codes.v, low), _mm512_and_si512(zero.v, low));
    const __m512i odd = _mm512_sub_epi16(_mm512_srli_epi16(codes.v, 8), _mm512_srli_epi16(zero.v, 8));
    const __m128i by = _mm_cvtsi32_si128(shift);
    const __m512i a = _mm512_mulhrs_epi16(_mm512_sll_epi16(even, by), f.even);
    const __m512i b = _mm512_mulhrs_epi16(_mm512_sll_epi16(odd, by), f.odd);
    return {_mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi16(b, 8))};
}

#elif defined(__AVX2__)

struct Bytes { __m256i a, b; };
struct Ints { __m256i a, b; };
struct Floats { __m256 a, b; };

INLINE __m256i load_half(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
INLINE void store_half(void *p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }

INLINE Bytes load_bytes(const uint8_t *p) { return {load_half(p), load_half(p + 32)}; }
INLINE void store(uint8_t *p, Bytes x) { store_half(p, x.a), store_half(p + 32, x.b); }
template <int N> INLINE Bytes shift_right(Bytes x) {
    if constexpr (N == 0) return x;
    else return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
template <int N> INLINE Bytes shift_left(Bytes x) {
    if constexpr (N == 0) return x;
    else return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int M> INLINE Bytes mask(Bytes x) {
    const __m256i m = _mm256_set1_epi8(char(M));
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
template <int M> INLINE Bytes merge(Bytes x, Bytes y) {
    const __m256i m = _mm256_set1_epi8(char(M));
    return {_mm256_or_si256(x.a, _mm256_and_si256(y.a, m)), _mm256_or_si256(x.b, _mm256_and_si256(y.b, m))};
}
struct ByteTable { __m256i v; };
INLINE ByteTable load_table(const uint8_t *p) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
}
INLINE Bytes look_up(ByteTable t, Bytes x) { return {_mm256_shuffle_epi8(t.v, x.a), _mm256_shuffle_epi8(t.v, x.b)}; }

INLINE Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints load_ints(const int32_t *p) { return {load_half(p), load_half(p + 8)}; }
INLINE void store(int32_t *p, Ints x) { store_half(p, x.a), store_half(p + 8, x.b); }
INLINE Ints set_ints(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE __m128i load_8_bytes(const void *p) { return _mm_loadl_epi64(static_cast<const __m128i *>(p)); }
INLINE Ints load_u8(const uint8_t *p) {
    return {_mm256_cvtepu8_epi32(load_8_bytes(p)), _mm256_cvtepu8_epi32(load_8_bytes(p + 8))};
}
INLINE Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE Ints operator-(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE Ints operator*(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
// Pairs of products of unsigned and signed bytes would saturate 16 bits from 128 on, so a byte goes as two nibbles.
INLINE __m256i dot_half(__m256i acc, __m256i u, __m256i x) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(u, nibble), x);
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi32(u, 4), nibble), x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
INLINE Ints dot(Ints acc, Bytes u, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i v = _mm256_set1_epi32(four);
    return {dot_half(acc.a, u.a, v), dot_half(acc.b, u.b, v)};
}
INLINE __m256i dot_small_half(__m256i acc, __m256i u, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
}
INLINE Ints dot_small(Ints acc, Bytes u, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i v = _mm256_set1_epi32(four);
    return {dot_small_half(acc.a, u.a, v), dot_small_half(acc.b, u.b, v)};
}
template <int J> INLINE Ints column(Bytes x) {
    const __m256i m = _mm256_set1_epi32(255);
    return {_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * J), m), _mm256_and_si256(_mm256_srli_epi32(x.b, 8 * J), m)};
}

INLINE Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats set_floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats load_floats(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Floats bits_to_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE Ints float_bits(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE void store_upper(uint16_t *p, Ints x) {
    alignas(32) uint32_t all[16];
    store_half(all, x.a), store_half(all + 8, x.b);
    for (int i = 0; i < 16; ++i) p[i] = uint16_t(all[i] >> 16);
}
INLINE void store_uppers(uint16_t *p, Ints x, Ints y) {
    store_half(p, _mm256_blend_epi16(_mm256_srli_epi32(x.a, 16), y.a, 0xaa));
    store_half(p + 16, _mm256_blend_epi16(_mm256_srli_epi32(x.b, 16), y.b, 0xaa));
}
INLINE Ints shift_left_ints(Ints x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
INLINE Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE Floats abs(Floats x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
INLINE unsigned above(Floats x, Floats bound) {
    const Floats y = abs(x);
    const int a = _mm256_movemask_ps(_mm256_cmp_ps(y.a, bound.a, _CMP_GT_OQ)), b = _mm256_movemask_ps(_mm256_cmp_ps(y.b, bound.b, _CMP_GT_OQ));
    return unsigned(a | b << 8);
}
INLINE Floats without(Floats x, Floats bound) {
    const Floats y = abs(x);
    return {_mm256_andnot_ps(_mm256_cmp_ps(y.a, bound.a, _CMP_GT_OQ), x.a), _mm256_andnot_ps(_mm256_cmp_ps(y.b, bound.b, _CMP_GT_OQ), x.b)};
}
INLINE Floats load_f16(const uint16_t *p) {
    const auto *q = reinterpret_cast<const __m128i *>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
INLINE Floats load_bf16(const uint16_t *p) {
    const auto *q = reinterpret_cast<const __m128i *>(p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
INLINE Floats load_i8(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_bytes(p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_bytes(p + 8)))};
}
INLINE void store_i8(int8_t *p, Ints x) {
    alignas(32) int32_t all[16];
    store_half(all, x.a), store_half(all + 8, x.b);
    for (int i = 0; i < 16; ++i) p[i] = int8_t(all[i]);
}
INLINE void store_f16(uint16_t *p, Floats x) {
    auto *q = reinterpret_cast<__m128i *>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
struct LevelTable { __m256 low, high; };
INLINE LevelTable load_levels(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE __m256 look_up_half(LevelTable t, __m256i i) {
    const __m256 low = _mm256_permutevar8x32_ps(t.low, i), high = _mm256_permutevar8x32_ps(t.high, i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
INLINE Floats look_up(LevelTable t, Ints codes) { return {look_up_half(t, codes.a), look_up_half(t, codes.b)}; }
INLINE float sum(Floats x) {
    alignas(32) float all[8];
    _mm256_store_ps(all, _mm256_add_ps(x.a, x.b));
    return ((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7]));
}
INLINE float largest(Floats x) {
    alignas(32) float all[8];
    _mm256_store_ps(all, _mm256_max_ps(x.a, x.b));
    float top = all[0];
    for (int i = 1; i < 8; ++i) top = all[i] > top ? all[i] : top;
    return top;
}
INLINE int sum(Ints x) {
    alignas(32) int32_t all[8];
    store_half(all, _mm256_add_epi32(x.a, x.b));
    int total = 0;
    for (int i = 0; i < 8; ++i) total += all[i];
    return total;
}
INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

struct Factor { __m256i a, b; };
INLINE Factor load_factor(const int16_t *p) {
    const auto *q = reinterpret_cast<const __m128i *>(p);
    const __m256i m = _mm256_cvtepu16_epi32(_mm_loadu_si128(q)), n = _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1));
    return {_mm256_or_si256(m, _mm256_slli_epi32(m, 16)), _mm256_or_si256(n, _mm256_slli_epi32(n, 16))};
}
INLINE Bytes spread_bytes(const uint8_t *p) {
    const __m256i each = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const Ints z = load_u8(p);
    return {_mm256_shuffle_epi8(z.a, each), _mm256_shuffle_epi8(z.b, each)};
}
INLINE __m256i rescale_half(__m256i codes, __m256i zero, __m256i f, int shift) {
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i even = _mm256_sub_epi16(_mm256_and_si256(codes, low), _mm256_and_si256(zero, low));
    const __m256i odd = _mm256_sub_epi16(_mm256_srli_epi16(codes, 8), _mm256_srli_epi16(zero, 8));
    const __m128i by = _mm_cvtsi32_si128(shift);
    const __m256i a = _mm256_mulhrs_epi16(_mm256_sll_epi16(even, by), f);
    const __m256i b = _mm256_mulhrs_epi16(_mm256_sll_epi16(odd, by), f);
    return _mm256_or_si256(_mm256_and_si256(a, low), _mm256_slli_epi16(b, 8));
}
INLINE Bytes rescale(Bytes codes, Bytes zero, Factor f, int shift) {
    return {rescale_half(codes.a, zero.a, f.a, shift), rescale_half(codes.b, zero.b, f.b, shift)};
}

#else

struct Bytes { uint8_t v[64]; };
struct Ints { int32_t v[16]; };
struct Floats { float v[16]; };

#define EACH for (int i = 0; i < 16; ++i)
#define EACH_BYTE for (int i = 0; i < 64; ++i)

INLINE Bytes load_bytes(const uint8_t *p) { Bytes r; std::memcpy(r.v, p, 64); return r; }
INLINE void store(uint8_t *p, Bytes a) { std::memcpy(p, a.v, 64); }
// Shifts within each byte are enough for every user: what crosses from a neighbour is masked away.
template <int N> INLINE Bytes shift_right(Bytes a) { EACH_BYTE a.v[i] = uint8_t(a.v[i] >> N); return a; }
template <int N> INLINE Bytes shift_left(Bytes a) { EACH_BYTE a.v[i] = uint8_t(a.v[i] << N); return a; }
template <int M> INLINE Bytes mask(Bytes a) { EACH_BYTE a.v[i] &= uint8_t(M); return a; }
template <int M> INLINE Bytes merge(Bytes a, Bytes b) { EACH_BYTE a.v[i] |= b.v[i] & uint8_t(M); return a; }
struct ByteTable { uint8_t v[16]; };
INLINE ByteTable load_table(const uint8_t *p) { ByteTable t; std::memcpy(t.v, p, 16); return t; }
INLINE Bytes look_up(const ByteTable &t, Bytes a) { EACH_BYTE a.v[i] = t.v[a.v[i] & 15]; return a; }

INLINE Ints set_ints(int x) { Ints r; EACH r.v[i] = x; return r; }
INLINE Ints zero_ints() { return set_ints(0); }
INLINE Ints load_ints(const int32_t *p) { Ints r; std::memcpy(r.v, p, 64); return r; }
INLINE void store(int32_t *p, Ints a) { std::memcpy(p, a.v, 64); }
INLINE Ints load_u8(const uint8_t *p) { Ints r; EACH r.v[i] = p[i]; return r; }
INLINE Ints operator+(Ints a, Ints b) { EACH a.v[i] = int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); return a; }
INLINE Ints operator-(Ints a, Ints b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE Ints operator*(Ints a, Ints b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE Ints dot(Ints acc, Bytes u, const int8_t *x) {
    EACH acc.v[i] += u.v[4 * i] * x[0] + u.v[4 * i + 1] * x[1] + u.v[4 * i + 2] * x[2] + u.v[4 * i + 3] * x[3];
    return acc;
}
INLINE Ints dot_small(Ints acc, Bytes u, const int8_t *x) { return dot(acc, u, x); }
template <int J> INLINE Ints column(Bytes a) { Ints r; EACH r.v[i] = a.v[4 * i + J]; return r; }

INLINE Floats set_floats(float x) { Floats r; EACH r.v[i] = x; return r; }
INLINE Floats zero_floats() { return set_floats(0); }
INLINE Floats load_floats(const float *p) { Floats r; std::memcpy(r.v, p, 64); return r; }
INLINE void store(float *p, Floats a) { std::memcpy(p, a.v, 64); }
INLINE Floats to_floats(Ints a) { Floats r; EACH r.v[i] = float(a.v[i]); return r; }
INLINE Ints to_ints(Floats a) { Ints r; EACH r.v[i] = int32_t(std::nearbyintf(a.v[i])); return r; }
INLINE Floats bits_to_floats(Ints a) { Floats r; std::memcpy(r.v, a.v, 64); return r; }
INLINE Ints float_bits(Floats a) { Ints r; std::memcpy(r.v, a.v, 64); return r; }
INLINE void store_upper(uint16_t *p, Ints a) { EACH p[i] = uint16_t(uint32_t(a.v[i]) >> 16); }
INLINE void store_uppers(uint16_t *p, Ints a, Ints b) {
    EACH p[2 * i] = uint16_t(uint32_t(a.v[i]) >> 16), p[2 * i + 1] = uint16_t(uint32_t(b.v[i]) >> 16);
}
INLINE Ints shift_left_ints(Ints a, int n) { EACH a.v[i] = int32_t(uint32_t(a.v[i]) << n); return a; }
INLINE Floats operator+(Floats a, Floats b) { EACH a.v[i] += b.v[i]; return a; }
INLINE Floats operator-(Floats a, Floats b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE Floats operator*(Floats a, Floats b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE Floats operator/(Floats a, Floats b) { EACH a.v[i] /= b.v[i]; return a; }
INLINE Floats fma(Floats a, Floats b, Floats c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
INLINE Floats max(Floats a, Floats b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE Floats min(Floats a, Floats b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE Floats abs(Floats a) { EACH a.v[i] = std::fabs(a.v[i]); return a; }
INLINE unsigned above(Floats a, Floats bound) { unsigned m = 0; EACH m |= unsigned(std::fabs(a.v[i]) > bound.v[i]) << i; return m; }
INLINE Floats without(Floats a, Floats bound) { EACH if (std::fabs(a.v[i]) > bound.v[i]) a.v[i] = 0; return a; }
INLINE Floats load_f16(const uint16_t *p) { Floats r; EACH r.v[i] = from_f16(p[i]); return r; }
INLINE Floats load_bf16(const uint16_t *p) { Floats r; EACH r.v[i] = from_bf16(p[i]); return r; }
INLINE Floats load_i8(const int8_t *p) { Floats r; EACH r.v[i] = float(p[i]); return r; }
INLINE void store_i8(int8_t *p, Ints a) { EACH p[i] = int8_t(a.v[i]); }
INLINE void store_f16(uint16_t *p, Floats a) { EACH p[i] = to_f16(a.v[i]); }
struct LevelTable { float v[16]; };
INLINE LevelTable load_levels(const float *p) { LevelTable t; std::memcpy(t.v, p, 64); return t; }
INLINE Floats look_up(const LevelTable &t, Ints codes) { Floats r; EACH r.v[i] = t.v[codes.v[i] & 15]; return r; }
INLINE float sum(Floats a) { float s = 0; EACH s += a.v[i]; return s; }
INLINE float largest(Floats a) { float s = a.v[0]; EACH s = a.v[i] > s ? a.v[i] : s; return s; }
INLINE int sum(Ints a) { int s = 0; EACH s += a.v[i]; return s; }
INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

struct Factor { int16_t v[16]; };
INLINE Factor load_factor(const int16_t *p) { Factor f; std::memcpy(f.v, p, 32); return f; }
INLINE Bytes spread_bytes(const uint8_t *p) { Bytes r; EACH_BYTE r.v[i] = p[i / 4]; return r; }
INLINE Bytes rescale(Bytes codes, Bytes zero, Factor f, int shift) {
    EACH_BYTE {
        const int value = (codes.v[i] - zero.v[i]) * (1 << shift);
        codes.v[i] = uint8_t(int8_t((value * f.v[i / 4] + (1 << 14)) >> 15));
    }
    return codes;
}
#undef EACH
#undef EACH_BYTE

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
