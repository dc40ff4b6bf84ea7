#include "matrix.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "../cpu.h"
#include "halves.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitpress {

void *take_memory(size_t bytes) {
    constexpr size_t huge = size_t(2) << 20;
    const size_t unit = bytes >= 2 * huge ? huge : 64;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    void *memory = std::aligned_alloc(unit, rounded);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (unit == huge) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0, rounded);
    return memory;
}

void give_memory(void *memory) { std::free(memory); }

namespace {

// Codes are stored as planes of 4, 2 and 1 bits, the low bits first; 8 bits are one plane of their own. A chunk is the fewest
// columns that fill whole lines of every plane.
constexpr int CHUNK[9] = {0, 32, 16, 32, 8, 32, 16, 32, 4};

struct PlaneBits {
    int bits, shift;
};

// The planes of a code of so many bits, in the order of the lines.
inline int planes_of(int bits, PlaneBits out[3]) {
    if (bits == 8) return out[0] = {8, 0}, 1;
    int count = 0, shift = 0;
    for (int size : {4, 2, 1}) {
        if (bits & size) out[count++] = {size, shift}, shift += size;
    }
    return count;
}

// Where column `c` of a chunk lies: the line, and the shift within its byte, for one plane.
struct Place {
    int line, shift;
};
Place place(int plane_bits, int c) {
    const int quads = 8 / plane_bits, quad = c / 4;
    return {quad / quads, quad % quads * plane_bits};
}

// Codes of 16 rows (null: zeros) as the lines of one block.
void fill_block(uint8_t *to, const uint8_t *const rows[STRIP], int columns, int width, int bits) {
    PlaneBits planes[3];
    const int count = planes_of(bits, planes), chunk = CHUNK[bits];
    uint8_t quads[8][64];
    for (int c = 0; c < width; c += chunk) {
        for (int q = 0; q < chunk / 4; ++q) {
            const int at = c + q * 4, left = columns - at;
            for (int r = 0; r < STRIP; ++r) {
                if (rows[r] != nullptr && left >= 4) std::memcpy(quads[q] + r * 4, rows[r] + at, 4);
                else for (int i = 0; i < 4; ++i) quads[q][r * 4 + i] = rows[r] != nullptr && i < left ? rows[r][at + i] : 0;
            }
        }
        for (int p = 0; p < count; ++p) {
            const int per_line = 8 / planes[p].bits, mask = (1 << planes[p].bits) - 1, low = planes[p].shift;
            for (int q = 0; q < chunk / 4; q += per_line, to += 64) {
                uint8_t line[64] = {};
                for (int i = 0; i < per_line; ++i) {
                    const int up = i * planes[p].bits;
                    for (int k = 0; k < 64; ++k) line[k] |= uint8_t((quads[q + i][k] >> low & mask) << up);
                }
                std::memcpy(to, line, 64);
            }
        }
    }
}

}  // namespace

int scale_bytes(ScaleKind kind) {
    switch (kind) {
        case ScaleKind::f32: return 4;
        case ScaleKind::f16:
        case ScaleKind::bf16: return 2;
        default: return 1;
    }
}

float scale_value(ScaleKind kind, const uint8_t *p) {
    uint16_t half;
    float full;
    switch (kind) {
        case ScaleKind::f32: std::memcpy(&full, p, 4); return full;
        case ScaleKind::f16: std::memcpy(&half, p, 2); return from_f16(half);
        case ScaleKind::bf16: std::memcpy(&half, p, 2); return from_bf16(half);
        case ScaleKind::e8m0: return bits_to_float(*p == 0 ? 1u << 22 : uint32_t(*p) << 23);
        default: return from_f16(uint16_t((*p & 0x80) << 8 | (*p & 0x7f) << 7)) * 256.0f;
    }
}

Cut make_cut(int columns, int group, int bits) {
    Cut cut;
    cut.columns = columns;
    cut.group = group;
    cut.groups = (columns + group - 1) / group;
    const int chunk = CHUNK[bits];
    cut.block = group;
    if (group > MAX_BLOCK) {  // the largest part of a group that needs no padding, or 128 with a ragged end
        cut.block = MAX_BLOCK;
        for (int size = MAX_BLOCK; size >= 64; size -= 32) {
            if (group % size == 0) {
                cut.block = size;
                break;
            }
        }
    }
    cut.blocks_per_group = (group + cut.block - 1) / cut.block;
    cut.width = (cut.block + chunk - 1) / chunk * chunk;
    if (int64_t(cut.groups) * cut.blocks_per_group * cut.width > 1 << 30) {
        throw std::invalid_argument("columns must be at most 1,073,741,824, every group padded to whole lines");
    }
    const int most = std::max(1, SEGMENT / cut.width), segments = (cut.blocks() + most - 1) / most;
    cut.per_segment = (cut.blocks() + segments - 1) / segments;  // as even as can be
    return cut;
}

void Coded::find_reach() {
    const int top = (1 << bits) - 1;
    reach = has_zeros ? top : std::max(zero, top - zero);
    if (has_table) {
        reach = 0;
        for (int i = 0; i <= top; ++i) reach = std::max(reach, std::abs(table[i] - 128));
    }
    reach = std::max(reach, 1);
}

Coded lay_out(const CodedParts &parts, int threads) {
    Coded m;
    m.rows = parts.rows;
    m.bits = parts.bits;
    m.zero = parts.zero;
    m.cut = make_cut(parts.columns, parts.group, parts.bits);
    m.kind = parts.kind;
    m.gain = parts.gain;
    m.has_zeros = parts.zeros != nullptr;
    m.has_table = parts.table != nullptr;
    const Cut &cut = m.cut;
    const int strips = m.strips(), size = scale_bytes(m.kind);
    m.lines.resize(size_t(strips) * cut.blocks() * m.block_bytes());
    m.scales.resize(size_t(strips) * cut.groups * STRIP * size);
    if (m.has_zeros) m.zeros.resize(size_t(strips) * cut.groups * STRIP);
    if (m.has_table) {
        std::memcpy(m.table, parts.table, 16);
        std::memcpy(m.levels, parts.levels, 64);
        m.zero = 128;
    }
    m.find_reach();
    parallel(threads, [&](int thread) {
        for (int strip = thread; strip < strips; strip += threads) {
            for (int r = 0; r < STRIP && strip * STRIP + r < m.rows; ++r) {
                const int row = strip * STRIP + r;
                for (int g = 0; g < cut.groups; ++g) {
                    std::memcpy(m.scales.data() + ((size_t(strip) * cut.groups + g) * STRIP + r) * size,
                                parts.scales + (size_t(row) * cut.groups + g) * size, size);
                    if (m.has_zeros) {
                        m.zeros[(size_t(strip) * cut.groups + g) * STRIP + r] = parts.zeros[size_t(row) * cut.groups + g];
                    }
                }
            }
            for (int b = 0; b < cut.blocks(); ++b) {
                const uint8_t *rows[STRIP];
                const int count_rows = std::min(STRIP, m.rows - strip * STRIP);
                for (int r = 0; r < STRIP; ++r) {
                    rows[r] = r < count_rows ? parts.codes + size_t(strip * STRIP + r) * parts.columns + cut.first_column(b) : nullptr;
                }
                fill_block(const_cast<uint8_t *>(m.block(strip, b)), rows, cut.columns_of(b), cut.width, m.bits);
            }
        }
    });
    return m;
}

int code_at(const Coded &m, int row, int column) {
    const Cut &cut = m.cut;
    const int group = column / cut.group, in_group = column % cut.group;
    const int b = group * cut.blocks_per_group + in_group / cut.block, c = in_group % cut.block;
    PlaneBits planes[3];
    const int count = planes_of(m.bits, planes), chunk = CHUNK[m.bits];
    const uint8_t *line = m.block(row / STRIP, b) + 4 * (row % STRIP) + c / chunk * (chunk * m.bits / 32) * 64;
    int code = 0;
    for (int p = 0; p < count; ++p) {
        const Place at = place(planes[p].bits, c % chunk);
        code |= (line[at.line * 64 + c % 4] >> at.shift & ((1 << planes[p].bits) - 1)) << planes[p].shift;
        line += chunk * planes[p].bits / 32 * 64;
    }
    return code;
}

Dense lay_out_dense(int rows, int columns, const uint16_t *values, bool half, const float *gain, int threads) {
    Dense m;
    m.rows = rows;
    m.columns = columns;
    m.half = half;
    m.values.resize(size_t(m.strips()) * columns * STRIP);
    if (gain != nullptr) {
        m.gain.resize(size_t(m.strips()) * STRIP);
        std::memcpy(m.gain.data(), gain, size_t(rows) * sizeof(float));
    }
    parallel(threads, [&](int thread) {
        for (int strip = thread; strip < m.strips(); strip += threads) {
            uint16_t *to = m.values.data() + size_t(strip) * columns * STRIP;
            for (int r = 0; r < STRIP && strip * STRIP + r < rows; ++r) {
                const uint16_t *from = values + size_t(strip * STRIP + r) * columns;
                for (int c = 0; c < columns; ++c) to[size_t(c) * STRIP + r] = from[c];
            }
        }
    });
    return m;
}

std::unique_lock<std::mutex> Turns::fill() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (users_ > 0) throw std::invalid_argument("the layer is in use by a product, a model or arrays of it and cannot change; make a new one");
    return lock;
}

void Turns::begin_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++users_;
}

void Turns::end_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --users_;
}

size_t Linear::bytes() const {
    size_t total = bias.bytes() + (map ? map->bytes() : 0);
    for (const Coded &m : coded) total += m.bytes();
    for (const Dense &m : dense) total += m.bytes();
    if (down) total += down->bytes() + up->bytes();
    if (sparse) total += sparse->bytes();
    return total;
}

void Linear::row(int r, float *out) const {
    std::vector<float> terms(size_t(columns), 0.0f);
    const int strip = r / STRIP, lane = r % STRIP;
    for (const Coded &m : coded) {
        const int size = scale_bytes(m.kind);
        for (int c = 0; c < columns; ++c) {
            const int g = c / m.cut.group, code = code_at(m, r, c);
            const float scale = scale_value(m.kind, m.scale(strip, g) + lane * size);
            if (m.has_table) terms[c] += m.levels[code] * scale;
            else terms[c] += float(code - (m.has_zeros ? m.zero_points(strip, g)[lane] : m.zero)) * (scale * m.gain);
        }
    }
    auto dense_row = [&](const Dense &m, int at, float factor) {
        const float gain = m.gain.size() ? m.gain[at] : 1.0f;
        for (int c = 0; c < m.columns; ++c) {
            const uint16_t value = m.strip(at / STRIP)[size_t(c) * STRIP + at % STRIP];
            terms[c] += factor * (gain * (m.half ? from_f16(value) : from_bf16(value)));
        }
    };
    for (const Dense &m : dense) dense_row(m, r, 1.0f);
    if (down) {
        for (int k = 0; k < up->columns; ++k) {
            const uint16_t value = up->strip(strip)[size_t(k) * STRIP + lane];
            const float gain = up->gain.size() ? up->gain[r] : 1.0f;
            dense_row(*down, k, gain * (up->half ? from_f16(value) : from_bf16(value)));
        }
    }
    if (sparse) {
        for (int64_t i = sparse->starts[r]; i < sparse->starts[r + 1]; ++i) terms[sparse->columns[i]] += sparse->values[i];
    }
    if (map) map->apply_transposed(terms.data(), out);
    else std::copy(terms.begin(), terms.end(), out);
}

}  // namespace bitpress
