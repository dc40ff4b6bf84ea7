// Half precision, in plain C++: for what runs once, and for machines without an instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitpress {

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

static inline float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // As the bits of a float, its exponent is 112 too small; a multiplication sets that right, for subnormal numbers too.
    return bits_to_float(sign | rest << 13) * 0x1p112f;
}

static inline uint16_t to_f16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return uint16_t(sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0));
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24, halves to even
        const float shifted = bits_to_float(bits) + 0.5f;
        uint32_t low;
        std::memcpy(&low, &shifted, 4);
        return uint16_t(sign | (low - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return uint16_t(sign | (bits - 0x38000000) >> 13);
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace bitpress
