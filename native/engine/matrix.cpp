#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "../cpu.h"
#include "halves.h"
#include "kernels.h"

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

// Codes are stored as planes of 8, 4, 2 and 1 bits, the low bits first. A chunk is the fewest codes that fill whole lines of every plane,
// by the bits beside whole bytes.
constexpr int CHUNK[8] = {4, 32, 16, 32, 8, 32, 16, 32};
constexpr int MOST_PLANES = 6, MOST_QUADS = 8;

struct PlaneBits {
    int bits, shift;
};

// The planes of a code of so many bits, in the order of the lines.
inline int planes_of(int bits, PlaneBits out[MOST_PLANES]) {
    int count = 0, shift = 0;
    for (; shift + 8 <= bits; shift += 8) out[count++] = {8, shift};
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
template <class T> void fill_block(uint8_t *to, const T *const rows[STRIP], int count, int width, int bits) {
    PlaneBits planes[MOST_PLANES];
    const int all = planes_of(bits, planes), chunk = CHUNK[bits % 8];
    T quads[MOST_QUADS][64];
    for (int c = 0; c < width; c += chunk) {
        for (int q = 0; q < chunk / 4; ++q) {
            const int at = c + q * 4, left = count - at;
            for (int r = 0; r < STRIP; ++r) {
                if (rows[r] != nullptr && left >= 4) std::memcpy(quads[q] + r * 4, rows[r] + at, 4 * sizeof(T));
                else for (int i = 0; i < 4; ++i) quads[q][r * 4 + i] = rows[r] != nullptr && i < left ? rows[r][at + i] : T(0);
            }
        }
        for (int p = 0; p < all; ++p) {
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

// Codes below 3 of 16 rows, five of them in a byte: columns c, c + 4, ... c + 16 of byte c % 4. The byte is the number of the five digits as a
// part of 243, in 256ths rounded up, so that three times the byte has the first digit above its lower 8 bits, and the rest in them.
void fill_trits(uint8_t *to, const uint8_t *const rows[STRIP], int count, int width) {
    constexpr int DIGITS = 5, ALL = 243;
    for (int c = 0; c < width; c += TRITS_CHUNK, to += 64) {
        for (int k = 0; k < 64; ++k) {
            int number = 0;
            for (int digit = 0; digit < DIGITS; ++digit) {
                const int at = c + 4 * digit + k % 4;
                number = number * 3 + (rows[k / 4] != nullptr && at < count ? rows[k / 4][at] : 0);
            }
            to[k] = uint8_t((number * 256 + ALL - 1) / ALL);
        }
    }
}

// Codes of 16 rows of which the odd ones have a bit more. That bit of 32 columns is a byte's place in the row itself, that of the next 32 in
// the row before.
void fill_uneven(uint8_t *to, const uint8_t *const rows[STRIP], int count, int width, int bits) {
    const int even = bits - 1, lines = UNEVEN_CHUNK * even / 32;
    for (int c = 0; c < width; c += UNEVEN_CHUNK, to += 64 * (lines + 1)) {
        const uint8_t *here[STRIP];
        for (int r = 0; r < STRIP; ++r) here[r] = rows[r] != nullptr ? rows[r] + c : nullptr;
        fill_block(to, here, count - c, UNEVEN_CHUNK, even);
        uint8_t *last = to + 64 * lines;
        std::memset(last, 0, 64);
        for (int r = 1; r < STRIP; r += 2) {
            for (int i = 0; here[r] != nullptr && i < std::min(UNEVEN_CHUNK, count - c); ++i) {
                const int quad = i / 4, row = quad < 8 ? r : r - 1;
                last[row * 4 + i % 4] |= uint8_t((here[r][i] >> even & 1) << quad % 8);
            }
        }
    }
}

template <class T> void fill_strip(Coded &m, int strip, const uint8_t *codes, int columns) {
    const Cut &cut = m.cut;
    const size_t in_row = size_t(columns + m.span - 1) / m.span;
    for (int b = 0; b < cut.blocks(); ++b) {
        const T *rows[STRIP];
        const int count_rows = std::min(STRIP, m.rows - strip * STRIP);
        for (int r = 0; r < STRIP; ++r) {
            const size_t at = size_t(strip * STRIP + r) * in_row + size_t(cut.first_column(b) / m.span);
            rows[r] = r < count_rows ? reinterpret_cast<const T *>(codes) + at : nullptr;
        }
        const int count = (cut.columns_of(b) + m.span - 1) / m.span;
        uint8_t *to = const_cast<uint8_t *>(m.block(strip, b));
        if constexpr (sizeof(T) == 1) {
            if (m.packing == Packing::trits) fill_trits(to, rows, count, cut.width);
            if (m.packing == Packing::uneven) fill_uneven(to, rows, count, cut.width, m.bits);
            if (m.packing != Packing::planes) continue;
        }
        fill_block(to, rows, count, cut.width / m.span, m.bits);
    }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The columns of a block of a group.
int block_of(int group, int chunk) {
    if (round_up(group, chunk) <= MAX_BLOCK) return group;
    for (int size = MAX_BLOCK; size >= 64; size -= 32) {  // the largest part of a group that needs no padding
        if (group % size == 0 && size % chunk == 0) return size;
    }
    int best = MAX_BLOCK / chunk * chunk;
    for (int size = best; size >= std::min(64, best); size -= chunk) {
        if (round_up(group, size) < round_up(group, best)) best = size;
    }
    return best;
}

int64_t padded_columns(int columns, int group, int chunk) {
    const int block = block_of(group, chunk);
    return int64_t((columns + group - 1) / group) * ((group + block - 1) / block) * round_up(block, chunk);
}

}  // namespace

int chunk_of(int bits, int span) { return CHUNK[bits % 8] * span; }

int stored_bits(int bits, int span) {
    while (chunk_of(bits, span) > MAX_BLOCK) ++bits;
    return bits;
}

Cut make_cut(int columns, int group, int chunk) {
    if (padded_columns(columns, group, chunk) > 1 << 30) {
        throw std::invalid_argument("columns must be at most 1,073,741,824, every group padded to whole lines");
    }
    Cut cut;
    cut.columns = columns;
    cut.group = group;
    cut.groups = (columns + group - 1) / group;
    cut.block = block_of(group, chunk);
    cut.blocks_per_group = (group + cut.block - 1) / cut.block;
    cut.width = int(round_up(cut.block, chunk));
    const int most = std::max(1, SEGMENT / cut.width), segments = (cut.blocks() + most - 1) / most;
    cut.per_segment = (cut.blocks() + segments - 1) / segments;  // as even as can be
    return cut;
}

int Coded::chunk() const {
    if (packing == Packing::planes) return chunk_of(bits, span);
    return packing == Packing::trits ? TRITS_CHUNK : UNEVEN_CHUNK;
}

void set_cut(Coded &m, int columns) {
    const int chunk = m.chunk();
    // A twentieth more for whole lines in every group is worth products that read the codes as they are.
    const bool apart = m.group < columns && m.group % m.span != 0;
    m.fine = !m.whole_sums && (apart || padded_columns(columns, m.group, chunk) * 20 > padded_columns(columns, columns, chunk) * 21);
    m.cut = make_cut(columns, m.fine ? columns : m.group, chunk);
}

size_t Coded::bytes() const {
    return lines.bytes() + scales.bytes() + zeros.values.bytes() + which.values.bytes() + less.bytes() + own.bytes() + words.bytes() + halves.bytes() +
           points.bytes() + counts.bytes() + near_words.bytes() + near_levels.bytes() + (levels.size() > 16 ? levels.bytes() : 0) + picked.bytes() +
           code_sums.bytes();
}

void Coded::sum_codes(const uint8_t *codes) {
    code_sums.resize(size_t(strips()) * cut.groups * STRIP);
    for (int row = 0; row < rows; ++row) {
        for (int c = 0; c < cut.columns; ++c) code_sums[(size_t(row / STRIP) * cut.groups + c / cut.group) * STRIP + row % STRIP] += *codes++;
    }
}

void Coded::find_reach() {
    const int top = (1 << std::min(bits, 8)) - 1;
    reach = zeros.any() ? top : std::max(zero, top - zero);
    if (kind == CodeKind::table) {
        reach = 0;
        for (int i = 0; i <= top; ++i) reach = std::max(reach, std::abs(table[i] - 128));
    }
    reach = std::max(reach, 1);
}

// N(numbers, pulses) = N(numbers - 1, pulses) + N(numbers - 1, pulses - 1) + N(numbers, pulses - 1), as `formats/grids/pyramid.py` counts.
void Coded::count_points() {
    if (kind != CodeKind::pyramid) return;
    const int wide = pulses + 1;
    counts.resize(size_t(span) * wide * (1 + wide));
    uint32_t *first = counts.data() + size_t(span) * wide;
    for (int after = 0; after < span; ++after) {
        uint32_t *row = counts.data() + size_t(after) * wide;
        for (int k = 0; k < wide; ++k) row[k] = k == 0 ? 1 : after == 0 ? 0 : row[k - wide] + row[k - wide - 1] + row[k - 1];
        for (int k = 0; k < wide; ++k) {
            uint32_t below = 0;
            for (int size = 0; size < wide; ++size, ++first) {
                *first = below;
                if (size <= k) below += row[k - size] * (size == 0 ? 1 : 2);
            }
        }
    }
}

Coded lay_out(CodedParts parts, int threads) {
    Coded m = std::move(parts.made);
    set_cut(m, parts.columns);
    m.find_reach();
    m.find_near();
    m.count_points();
    if (m.has_code_sums) m.sum_codes(parts.codes);
    const int strips = m.strips();
    m.lines.resize(size_t(strips) * m.cut.blocks() * m.block_bytes());
    parallel(threads, [&](int thread) {
        for (int strip = thread; strip < strips; strip += threads) {
            if (parts.size == 1) fill_strip<uint8_t>(m, strip, parts.codes, parts.columns);
            else if (parts.size == 2) fill_strip<uint16_t>(m, strip, parts.codes, parts.columns);
            else fill_strip<uint32_t>(m, strip, parts.codes, parts.columns);
        }
    });
    return m;
}

int code_at(const Coded &m, int row, int column) {
    const Cut &cut = m.cut;
    const int group = column / cut.group, in_group = column % cut.group;
    const int b = group * cut.blocks_per_group + in_group / cut.block, c = in_group % cut.block / m.span;
    PlaneBits planes[MOST_PLANES];
    const int count = planes_of(m.bits, planes), chunk = CHUNK[m.bits % 8];
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

Sparse::Sparse(int width, std::vector<int64_t> rows, const int32_t *at, const float *all) : starts(std::move(rows)) {
    const size_t count = size_t(starts.back());
    const auto is_half = [](float value) { return from_f16(to_f16(value)) == value; };
    if (width <= 1 << 16) narrow.assign(at, at + count);
    else wide.assign(at, at + count);
    if (!std::all_of(all, all + count, is_half)) {
        floats.assign(all, all + count);
        return;
    }
    halves.reserve(count);
    for (size_t i = 0; i < count; ++i) halves.push_back(to_f16(all[i]));
}

float Sparse::value(int64_t i) const { return floats.empty() ? from_f16(halves[size_t(i)]) : floats[size_t(i)]; }

size_t Linear::bytes() const {
    size_t total = bias.bytes() + (map ? map->bytes() : 0) + (out_map ? out_map->bytes() : 0);
    for (const Coded &m : coded) total += m.bytes();
    for (const Dense &m : dense) total += m.bytes();
    if (down.any()) total += down.bytes() + up.bytes();
    if (sparse) total += sparse->bytes();
    return total;
}

void Path::take(const int32_t *from) {
    state_bits = from[0], shifts[0] = from[1], shifts[1] = from[2], multiplier = from[3];
    std::copy(from + 4, from + COUNT, polynomial);
    const bool small = shifts[0] >= 1 && shifts[0] <= 8 && shifts[1] >= 1 && shifts[1] <= 8;
    if (!small || state_bits < 1 || state_bits > STRIP) throw std::invalid_argument("a path has 1 to 16 bits of state, and 1 to 8 a row");
    bool halves = multiplier >= 0 && multiplier <= 0xffff;
    for (const int32_t c : polynomial) halves = halves && c >= -32768 && c <= 32767;
    if (!halves) throw std::invalid_argument("the constants of a path have 16 bits");
}

void Path::give(int32_t *to) const {
    to[0] = state_bits, to[1] = shifts[0], to[2] = shifts[1], to[3] = multiplier;
    std::copy(polynomial, polynomial + 5, to + 4);
}

}  // namespace bitpress
