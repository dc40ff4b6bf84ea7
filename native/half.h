// Rounding to half floats.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace bitpress {

// To the nearest half float, halves to even; infinity beyond its range. Exact for every float.
inline float as_half(float x) {
    const float size = std::fabs(x);
    if (!(size < 65520.0f)) return std::copysign(INFINITY, x);
    // A sum with a power of two whose last bit is the half float's last bit rounds there; denormal ones share the smallest exponent.
    const int exponent = std::max(static_cast<int>(std::bit_cast<std::uint32_t>(size) >> 23) - 127, -14);
    const float magic = std::bit_cast<float>(static_cast<std::uint32_t>(exponent - 10 + 23 + 127) << 23);
    return std::copysign((size + magic) - magic, x);
}

}  // namespace bitpress
