#include "per_block.h"

#include <algorithm>
#include <cstring>

#include "halves.h"

namespace bitpress {

const float SHIFTS[16] = {0x1p0f,  0x1p-1f, 0x1p-2f,  0x1p-3f,  0x1p-4f,  0x1p-5f,  0x1p-6f, 0x1p-7f,
                          0x1p-8f, 0x1p-9f, 0x1p-10f, 0x1p-11f, 0x1p-12f, 0x1p-13f, 0x1p-14f, 0.0f};

void PerBlock::fill(const uint8_t *from) {
    values.resize(size());
    const size_t bytes = bits < 8 ? 1 : size_t(bits) / 8;
    for (int r = 0; r < down(); ++r) {
        for (int g = 0; g < groups; ++g, from += bytes) {
            const size_t at = index(r * tall, g);
            if (bits == 6) {
                uint8_t *p = values.data() + at / 16 * SIX;
                const size_t i = at % 16;
                p[i / 2] |= uint8_t((*from & 15) << i % 2 * 4), p[8 + i / 4] |= uint8_t((*from >> 4) << i % 4 * 2);
            } else if (bits < 8) values[at * bits / 8] |= uint8_t(*from << at * bits % 8);
            else std::memcpy(values.data() + at * bytes, from, bytes);
        }
    }
}

int scale_bits(ScaleKind kind) {
    switch (kind) {
        case ScaleKind::f32: return 32;
        case ScaleKind::f16:
        case ScaleKind::bf16: return 16;
        case ScaleKind::s4:
        case ScaleKind::run4:
        case ScaleKind::p2row: return 4;
        case ScaleKind::s6:
        case ScaleKind::run6: return 6;
        default: return 8;
    }
}

void Scales::shape_factors() {
    factors.rows = each.rows, factors.tall = each.tall, factors.bits = 16;
    factors.groups = int((unsigned(each.groups) * unsigned(planes) - 1) >> run_bits) + 1;  // those of all planes
}

float scale_at(const Scales &s, int row, int group) {
    const PerBlock &each = s.each;
    const int block_row = row / each.tall;
    if (s.has_runs()) {
        uint16_t factor;
        std::memcpy(&factor, s.factors.bytes_of(row, s.run_of(group)), 2);
        return (float(each.code(row, group)) + s.offset) * from_f16(factor);
    }
    if (each.bits == 4) {
        const unsigned code = each.code(row, group);
        return (s.kind == ScaleKind::s4 ? float(code) : SHIFTS[code]) * s.rows[size_t(block_row)];
    }
    if (each.bits == 6) return float(each.code(row, group)) * s.rows[size_t(block_row)];
    const uint8_t *p = each.bytes_of(row, group);
    uint16_t half;
    float full;
    switch (s.kind) {
        case ScaleKind::f32: std::memcpy(&full, p, 4); return full;
        case ScaleKind::f16: std::memcpy(&half, p, 2); return from_f16(half);
        case ScaleKind::bf16: std::memcpy(&half, p, 2); return from_bf16(half);
        case ScaleKind::e8m0: return bits_to_float(*p == 0 ? 1u << 22 : uint32_t(*p) << 23);
        case ScaleKind::s8: return float(*p) * s.rows[size_t(block_row)];
        case ScaleKind::dq: {
            const size_t at = (size_t(block_row) * each.groups + group) * s.planes + s.plane;
            return std::max(s.shared[*p] * s.shared[256 + at / SHARED_BY] + s.offset, 0.0f);
        }
        default: return from_f16(uint16_t((*p & 0x80) << 8 | (*p & 0x7f) << 7)) * 256.0f;
    }
}

}  // namespace bitpress
