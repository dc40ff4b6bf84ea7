#include "gram.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitpress {

#if defined(__x86_64__)

namespace {

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

constexpr std::int64_t kTile = 16;          // channels of a tile
constexpr std::int64_t kPair = 2 * kTile;   // channels that a block of 2 x 2 tiles takes from each side
constexpr std::int64_t kStep = 32;          // tokens that one tile product sums over
constexpr std::int64_t kChunk = 512;        // tokens packed at a time: 1,536 channels of them are 1.6 MB for each operand
constexpr std::int64_t kSteps = kChunk / kStep;
constexpr std::int64_t kLines = 16;         // 64-byte lines of a tile
constexpr std::int64_t kWords = 16;         // 32-bit words of a line
constexpr std::int64_t kColumn = kSteps * kLines * kWords;  // words of a packed column of tiles
constexpr std::int64_t kShared = 8;         // pairs a thread must have: with fewer, packing what all read outweighs the products
constexpr std::int64_t kPanel = 4;          // pairs of tile columns that are multiplied by the same pair while that is at hand

struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

const TileConfig kConfig;

AMX void load_config() {
    // Compilers think that this reads 8 of the 64 bytes only; the barrier keeps the stores to all of them.
    __asm__ volatile("" ::"m"(kConfig) : "memory");
    _tile_loadconfig(&kConfig);
}

AMX void transpose16(const __m512i in[16], __m512i out[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i low0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), low1 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        const __m512i high0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd), high1 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        out[i] = _mm512_shuffle_i32x4(low0, low1, 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
        out[i + 4] = _mm512_shuffle_i32x4(high0, high1, 0x88);
        out[i + 12] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
}

// One tile: `right` has pairs of tokens in lines and channels across, `left` is its transpose; either may be null.
AMX void pack_tile(const std::uint16_t *x, std::int64_t n, std::int64_t tokens, std::int64_t channels, std::uint32_t *left,
                   std::uint32_t *right) {
    const __mmask16 mask = static_cast<__mmask16>((1u << channels) - 1);
    __m512i lines[16], turned[16];
    for (std::int64_t line = 0; line < kLines; ++line) {
        const std::int64_t first = 2 * line;
        const __m256i even = first < tokens ? _mm256_maskz_loadu_epi16(mask, x + first * n) : _mm256_setzero_si256();
        const __m256i odd = first + 1 < tokens ? _mm256_maskz_loadu_epi16(mask, x + (first + 1) * n) : _mm256_setzero_si256();
        lines[line] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    for (std::int64_t line = 0; right && line < kLines; ++line) _mm512_store_si512(right + line * 16, lines[line]);
    if (!left) return;
    transpose16(lines, turned);
    for (std::int64_t line = 0; line < kLines; ++line) _mm512_store_si512(left + line * 16, turned[line]);
}

// Adds the products of two pairs of packed tile columns to a 32 x 32 block of the sum, and fetches what comes next: the block at
// `next_block`, and from `next_right` on as many lines for each step.
AMX void add_block(float *block, std::int64_t padded, const std::uint32_t *left, const std::uint32_t *right, std::int64_t steps,
                   const float *next_block, const std::uint32_t *next_right, std::int64_t lines) {
    const std::int64_t stride = padded * static_cast<std::int64_t>(sizeof(float));
    float *lower = block + kTile * padded;
    _tile_loadd(0, block, stride);
    _tile_loadd(1, block + kTile, stride);
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + kTile, stride);
    for (std::int64_t step = 0; step < steps; ++step) {
        const std::int64_t at = step * kLines * kWords;
        _tile_loadd(4, left + at, 64);
        _tile_loadd(6, right + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + at + kColumn, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + at + kColumn, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (std::int64_t row = 2 * step; row < 2 * step + 2; ++row) {
            _mm_prefetch(reinterpret_cast<const char *>(next_block + row * padded), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char *>(next_block + row * padded + kTile), _MM_HINT_T0);
        }
        for (std::int64_t line = 0; line < lines; ++line) {
            _mm_prefetch(reinterpret_cast<const char *>(next_right + (step * lines + line) * kWords), _MM_HINT_T1);
        }
    }
    _tile_stored(0, block, stride);
    _tile_stored(1, block + kTile, stride);
    _tile_stored(2, lower, stride);
    _tile_stored(3, lower + kTile, stride);
}

AMX void release_tiles() { _tile_release(); }

struct Aligned {
    explicit Aligned(std::size_t count)
        : words(count), data(static_cast<std::uint32_t *>(::operator new(count * 4, std::align_val_t{64}))) {}
    ~Aligned() { ::operator delete(data, std::align_val_t{64}); }
    Aligned(const Aligned &) = delete;
    Aligned &operator=(const Aligned &) = delete;
    std::size_t words;
    std::uint32_t *data;
};

// Pairs of tile columns from `first` to `last`, below which lies a part of the sum that one thread makes.
struct Panel {
    std::int64_t first, last;
};

// Deals panels out so that threads have about equally many blocks; in a `triangle` those further down have fewer.
std::vector<std::vector<Panel>> deal(std::int64_t pairs, int threads, bool triangle) {
    const std::int64_t size = std::clamp<std::int64_t>(pairs / (2 * threads), 1, kPanel);
    std::vector<std::vector<Panel>> dealt(static_cast<std::size_t>(threads));
    std::vector<std::int64_t> blocks(dealt.size());
    for (std::int64_t first = 0; first < pairs; first += size) {
        const std::int64_t last = std::min(first + size, pairs);
        const auto least = std::min_element(blocks.begin(), blocks.end());
        *least += (last - first) * (triangle ? pairs - first : pairs);
        dealt[static_cast<std::size_t>(least - blocks.begin())].push_back({first, last});
    }
    return dealt;
}

// What one thread has of the packed operands. Sharing them would cost more than packing them twice: the processors would keep
// taking each other's lines away.
struct Packed {
    explicit Packed(std::int64_t pairs) : left(static_cast<std::size_t>(pairs * 2 * kColumn)), right(left.words) {}
    Aligned left, right;
};

// Packs `here` tokens of the pairs from `first` on, of the left side those of the thread's panels.
void pack(Packed &packed, const std::uint16_t *a, const std::uint16_t *b, std::int64_t here, std::int64_t n, std::int64_t first,
          const std::vector<char> &is_left) {
    // Tokens outside, channels inside: memory is read in order.
    for (std::int64_t step = 0; step * kStep < here; ++step) {
        for (std::int64_t tile = 2 * first; tile < 2 * static_cast<std::int64_t>(is_left.size()); ++tile) {
            const std::int64_t channels = std::clamp<std::int64_t>(n - tile * kTile, 0, kTile);
            const std::int64_t from = step * kStep * n + tile * kTile, at = tile * kColumn + step * kLines * kWords;
            std::uint32_t *left = is_left[static_cast<std::size_t>(tile / 2)] ? packed.left.data + at : nullptr;
            std::uint32_t *right = packed.right.data + at;
            if (a == b) {
                pack_tile(a + from, n, here - step * kStep, channels, left, right);
            } else {
                if (left) pack_tile(a + from, n, here - step * kStep, channels, left, nullptr);
                pack_tile(b + from, n, here - step * kStep, channels, nullptr, right);
            }
        }
    }
}

// Adds a.T @ b, where a and b are the same only on and above the diagonal.
void add(float *sum, std::int64_t padded, const std::uint16_t *a, const std::uint16_t *b, std::int64_t tokens, std::int64_t n,
         int threads) {
    if (!has_amx_bf16()) throw std::runtime_error("this processor has no AMX tiles for bf16");
    const std::int64_t pairs = (n + kPair - 1) / kPair;
    const int used = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, pairs / kShared)));
    const auto dealt = deal(pairs, used, a == b);
    parallel(used, [&](int index) {
        const auto &panels = dealt[static_cast<std::size_t>(index)];
        if (panels.empty()) return;
        const std::int64_t begin = a == b ? panels.front().first : 0;
        std::vector<char> is_left(static_cast<std::size_t>(pairs));
        for (const Panel &panel : panels) std::fill(is_left.begin() + panel.first, is_left.begin() + panel.last, 1);
        Packed packed(pairs);
        load_config();
        for (std::int64_t start = 0; start < tokens; start += kChunk) {
            const std::int64_t here = std::min(kChunk, tokens - start), steps = (here + kStep - 1) / kStep;
            pack(packed, a + start * n, a == b ? a + start * n : b + start * n, here, n, begin, is_left);
            for (const Panel &panel : panels) {
                for (std::int64_t across = a == b ? panel.first : 0; across < pairs; ++across) {
                    const std::int64_t end = a == b ? std::min(panel.last, across + 1) : panel.last;
                    const std::int64_t lines = 2 * kLines / (end - panel.first);
                    const std::int64_t then = std::min(across + 1, pairs - 1);
                    for (std::int64_t down = panel.first; down < end; ++down) {
                        const std::int64_t below = down + 1 < end ? down + 1 : panel.first;
                        const float *next = sum + below * kPair * padded + (below > down ? across : then) * kPair;
                        const std::uint32_t *next_right =
                            packed.right.data + then * 2 * kColumn + (down - panel.first) * steps * lines * kWords;
                        add_block(sum + down * kPair * padded + across * kPair, padded, packed.left.data + down * 2 * kColumn,
                                  packed.right.data + across * 2 * kColumn, steps, next, next_right, lines);
                    }
                }
            }
        }
        release_tiles();
    });
}

}  // namespace

#else

namespace {

void add(float *, std::int64_t, const std::uint16_t *, const std::uint16_t *, std::int64_t, std::int64_t, int) {
    throw std::runtime_error("this processor has no AMX tiles for bf16");
}

}  // namespace

#endif

void add_gram(float *gram, std::int64_t padded, const std::uint16_t *x, std::int64_t tokens, std::int64_t n, int threads) {
    add(gram, padded, x, x, tokens, n, threads);
}

void add_product(float *sum, std::int64_t padded, const std::uint16_t *a, const std::uint16_t *b, std::int64_t tokens,
                 std::int64_t n, int threads) {
    if (a == b) throw std::invalid_argument("a product of a matrix with itself is a gram");
    add(sum, padded, a, b, tokens, n, threads);
}

}  // namespace bitpress
