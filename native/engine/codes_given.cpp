#include "codes_given.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

namespace nb = nanobind;

namespace bitpress {

namespace {

constexpr const char *KIND_NAMES[CODE_KINDS] = {"whole", "table", "levels", "own", "halves", "words", "e8p", "trellis", "pairs", "pyramid"};
constexpr const char *PACKING_NAMES[PACKINGS] = {"planes", "trits", "uneven"};
constexpr int MOST_RUN = 256, MOST_TABLES = 256, MOST_SPAN = 32, MOST_WORD_BITS = 16, MOST_PULSES = 32, MOST_PLANES = 4;

ScaleKind scale_kind(const std::string &name) {
    static const std::map<std::string, ScaleKind> kinds = {
        {"fp32", ScaleKind::f32}, {"fp16", ScaleKind::f16}, {"bf16", ScaleKind::bf16},   {"e8m0", ScaleKind::e8m0}, {"fp8", ScaleKind::e4m3},
        {"s4", ScaleKind::s4},    {"s6", ScaleKind::s6}, {"s8", ScaleKind::s8},    {"p2row", ScaleKind::p2row}, {"dq", ScaleKind::dq},
        {"run4", ScaleKind::run4}, {"run6", ScaleKind::run6}, {"run8", ScaleKind::run8}};
    const auto found = kinds.find(name);
    need(found != kinds.end(), "scales must be fp32, fp16, bf16, e8m0, fp8, s4, s6, s8, p2row, dq, run4, run6 or run8");
    return found->second;
}

// Whether all values are below 2^bits.
template <class T> bool fit(const T *values, size_t count, int bits) {
    T largest = 0;
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, values[i]);
    return uint64_t(largest) >> bits == 0;
}

bool codes_fit(const Bytes2 &codes, int size, int bits) {
    const size_t count = codes.size() / size_t(size);
    if (size == 1) return fit(codes.data(), count, bits);
    if (size == 2) return fit(reinterpret_cast<const uint16_t *>(codes.data()), count, bits);
    return fit(reinterpret_cast<const uint32_t *>(codes.data()), count, bits);
}

bool fit_trits(const Bytes2 &codes) { return std::all_of(codes.data(), codes.data() + codes.size(), [](uint8_t code) { return code < 3; }); }

// Whether the codes of even rows fit so many bits.
bool fit_uneven(const Bytes2 &codes, int even) {
    for (size_t row = 0; row < codes.shape(0); row += 2) {
        if (!fit(codes.data() + row * codes.shape(1), codes.shape(1), even)) return false;
    }
    return true;
}

template <class T> Aligned<T> copied(const T *from, size_t count) {
    Aligned<T> to(count);
    if (count) std::memcpy(to.data(), from, count * sizeof(T));
    return to;
}

PerBlock shape_of(int rows, int groups, int tall, int bits) {
    PerBlock p;
    p.rows = rows, p.groups = groups, p.tall = tall, p.bits = bits;
    return p;
}

void take_shared(Scales &s, nb::handle given) {
    need(given.is_none() != (s.has_rows() || s.has_runs() || s.kind == ScaleKind::dq), "s4, s6, s8, p2row, dq and runs have shared values, and no others");
    if (given.is_none()) return;
    const Part part("shared", given);
    if (s.has_rows()) {
        const auto rows = part.array<float>("rows", size_t(s.each.down()));
        s.rows.resize(s.row_count());
        std::memcpy(s.rows.data(), rows.data(), rows.size() * sizeof(float));
        return;
    }
    s.planes = part.whole("planes", 1, MOST_PLANES), s.plane = part.whole("plane", 0, s.planes - 1);
    s.offset = part.number("offset");
    if (s.has_runs()) {
        const int run = part.whole("run", 1, MOST_RUN);
        if (run & (run - 1)) refuse(part.path("run"), "a power of two");
        while (1 << s.run_bits < run) ++s.run_bits;
        s.shape_factors();
        const auto factors = part.array<uint16_t>("factors", size_t(s.factors.down()) * s.factors.groups);
        s.factors.fill(reinterpret_cast<const uint8_t *>(factors.data()));
    } else {
        const auto levels = part.array<float>("levels", 256);
        const auto factors = part.array<float>("factors", s.shared_count() - 256);
        s.shared.resize(s.shared_count());
        std::memcpy(s.shared.data(), levels.data(), 256 * sizeof(float));
        std::memcpy(s.shared.data() + 256, factors.data(), factors.size() * sizeof(float));
    }
}

// The scales of blocks of `tall` rows, in `groups` of columns.
void take_scales(Scales &s, const std::string &kind, const Bytes2 &given, nb::handle shared, int rows, int groups, int tall) {
    s.kind = scale_kind(kind);
    s.each = shape_of(rows, groups, tall, scale_bits(s.kind));
    const size_t each = s.each.bits < 8 ? 1 : size_t(s.each.bits) / 8;
    need(is_matrix(given, size_t(rows / tall), size_t(groups) * each), "scales must be the bytes of [rows of blocks, groups]");
    need(s.each.bits >= 8 || fit(given.data(), given.size(), s.each.bits), "a scale's code is too large for its bits");
    take_shared(s, shared);
    s.each.fill(given.data());
}

void take_less(Coded &m, nb::handle given) {
    if (given.is_none()) return;
    const Part part("less", given);
    const PerBlock &each = m.scales.each;
    m.less.of_codes = part.claim("of_codes"), m.less.gain = part.number("gain");
    const auto kind = taken<std::string>(part.at("kind"), part.path("kind"), "a name");
    const auto values = taken<Bytes2>(part.at("values"), part.path("values"), "an array of bytes of two dimensions and contiguous", false);
    take_scales(m.less.scales, kind, values, part.at("shared"), each.rows, each.groups, each.tall);
}

// The levels of blocks of one row side by side for the rows of a strip.
Aligned<uint16_t> striped(const Coded &m, const uint16_t *from) {
    const PerBlock &each = m.scales.each;
    const size_t count = m.level_count();
    Aligned<uint16_t> to(own_count(m));
    for (int r = 0; r < each.down(); ++r) {
        for (int g = 0; g < each.groups; ++g, from += count) {
            for (size_t i = 0; i < count; ++i) {
                const size_t at = each.striped() ? (each.index(r / STRIP * STRIP, g) * count + i * STRIP + r % STRIP) : each.index(r * each.tall, g) * count + i;
                to[at] = from[i];
            }
        }
    }
    return to;
}

void take_meaning(Coded &m, const Part &part) {
    m.kind = code_kind(taken<std::string>(part.at("kind"), part.path("kind"), "a name"));
    const bool one_each = m.kind == CodeKind::levels || m.kind == CodeKind::own || m.kind == CodeKind::halves || m.kind == CodeKind::trellis ||
                          m.kind == CodeKind::pairs;
    need(!one_each || m.bits <= 8, "codes of single weights have at most 8 bits");
    need(!m.zeros.any() || m.kind == CodeKind::halves, "only whole and half numbers have zero points");
    if (m.kind == CodeKind::levels || m.kind == CodeKind::pairs) {
        const bool is_pair = m.kind == CodeKind::pairs;
        need(!is_pair || (m.span == 1 && m.group % 2 == 0), "groups of pairs have whole pairs of columns");
        const int tables = part.whole("tables", 1, MOST_TABLES);
        const auto levels = part.array<float>("levels", size_t(tables) << (m.bits + is_pair));
        if (tables > 1) {
            const PerBlock &each = m.scales.each;
            int bits = 1;
            while (1 << bits < tables) ++bits;
            m.which = shape_of(each.rows, each.groups, each.tall, bits_that_hold(bits));
            const auto which = part.array<uint8_t>("which", size_t(each.down()) * each.groups);
            for (size_t i = 0; i < which.size(); ++i) need(which.data()[i] < tables, "a block names a table that is not there");
            m.which.fill(which.data());
        }
        m.levels.resize(m.level_count() << (m.which.bits + is_pair));  // as many tables as blocks can name
        std::memcpy(m.levels.data(), levels.data(), levels.size() * sizeof(float));
    } else if (m.kind == CodeKind::own) {
        const PerBlock &each = m.scales.each;
        const auto own = part.array<uint16_t>("own", size_t(each.down()) * each.groups << m.bits);
        m.own = striped(m, own.data());
    } else if (m.kind == CodeKind::words) {
        m.books = part.whole("books", 1, MOST_WORD_BITS);
        m.word_bits = part.whole("word_bits", 1, MOST_WORD_BITS / m.books);
        if (part.has("halves")) {
            const auto halves = part.array<uint16_t>("halves", word_count(m));
            m.halves = copied(halves.data(), halves.size());
        } else {
            const auto words = part.array<float>("words", word_count(m));
            m.words = copied(words.data(), words.size());
        }
    } else if (m.kind == CodeKind::e8p) {
        need(m.bits == 16 && m.span == 8, "codes of e8p have 16 bits for 8 columns");
        const auto points = part.array<uint8_t>("points", 256 * 8);
        m.points = copied(points.data(), points.size());
    } else if (m.kind == CodeKind::trellis) {
        need(m.span == 1, "a code of a path is that of one column");
        m.path.take(part.array<int32_t>("path", Path::COUNT).data());
    } else if (m.kind == CodeKind::pyramid) {
        m.pulses = part.whole("pulses", 1, MOST_PULSES);
    }
}

Packing packing_of(const std::string &name) {
    const auto *found = std::find_if(PACKING_NAMES, PACKING_NAMES + PACKINGS, [&](const char *each) { return name == each; });
    need(found != PACKING_NAMES + PACKINGS, "packing must be planes, trits or uneven");
    return Packing(found - PACKING_NAMES);
}

}  // namespace

void check_packing(const Coded &m) {
    need(m.packing != Packing::trits || (m.kind <= CodeKind::table && m.bits == 2), "trits are codes of 2 bits for whole numbers or a table");
    need(m.packing != Packing::uneven || (m.kind == CodeKind::trellis && m.bits >= 2), "only codes of a path have a bit more in every second row");
    need(!m.less.any() || (m.kind == CodeKind::whole && m.packing == Packing::planes), "only whole numbers in planes have something taken away");
}

void take_picked(Coded &m, const Array<const int32_t, 1> &picked, int columns) {
    const size_t count = picked.shape(0);
    need(count >= 1 && count <= size_t(columns), "picked columns must be 1 to all of the layer's");
    for (size_t i = 0; i < count; ++i) {
        need(picked.data()[i] >= (i == 0 ? 0 : picked.data()[i - 1] + 1) && picked.data()[i] < columns, "picked columns must rise and be those of the layer");
    }
    m.picked = copied(picked.data(), count);
}

namespace {

CodeRange take_range(const Part &part, int columns) {
    CodeRange r;
    r.bits = part.whole("bits", 1, 8), r.has_zero = part.claim("has_zero"), r.group = part.whole("group", 1, columns);
    need(r.bits > 1 || r.has_zero, "one bit without a zero point has no positive level");
    r.kind = scale_kind(taken<std::string>(part.at("kind"), part.path("kind"), "a name"));
    need(r.kind == ScaleKind::f32 || r.kind == ScaleKind::f16 || r.kind == ScaleKind::bf16, "scales of inputs are kept in fp32, fp16 or bf16");
    return r;
}

}  // namespace

Rounding take_rounding(const Part &part, int columns) {
    Rounding r;
    if (part.has("first")) {
        const Part leading{part.path("first"), part.at("first")};
        r.first = leading.whole("columns", 1, columns - 1);
        r.leading = take_range(leading, r.first);
    }
    static_cast<CodeRange &>(r) = take_range(part, columns - r.first);
    r.fixed = part.has("scale"), r.zero = r.middle();
    if (!r.fixed) return r;
    need(r.first == 0, "a fixed scale is for all columns, and the first ones have a range of their own");
    r.scale = part.number("scale");
    need(r.scale > 0 && r.group == columns, "a fixed scale must be above 0, and is for all columns");
    if (r.has_zero) r.zero = part.whole("zero", 0, r.top());
    return r;
}

void sum_whole(Coded &m, const Rounding &rounding) {
    const bool stands_alone = m.kind == CodeKind::whole && m.packing == Packing::planes && !m.less.any() && !m.picked.size();
    m.whole_sums = stands_alone && rounding.run() % m.group == 0 && m.group <= MOST_SUMMED;
    m.has_code_sums = m.whole_sums && (rounding.has_zero || (rounding.first > 0 && rounding.leading.has_zero));
}

const char *code_kind_name(CodeKind kind) { return KIND_NAMES[int(kind)]; }

CodeKind code_kind(const std::string &name) {
    const auto *found = std::find_if(KIND_NAMES + 2, KIND_NAMES + CODE_KINDS, [&](const char *each) { return name == each; });
    need(found != KIND_NAMES + CODE_KINDS, "codes must be levels, own, halves, words, e8p, trellis, pairs or pyramid");
    return CodeKind(found - KIND_NAMES);
}

size_t own_count(const Coded &m) { return m.kind == CodeKind::own ? m.scales.each.count() * m.level_count() : 0; }

size_t word_count(const Coded &m) { return (size_t(m.books) << m.word_bits) * size_t(m.span); }

CodedParts take_codes(const CodesGiven &given, int rows, int all_columns) {
    const int bits = given.bits;
    const int columns = given.picked ? int(std::min(given.picked->shape(0), size_t(all_columns))) : all_columns;
    const bool has_meaning = !given.meaning.is_none();
    need(bits >= 1 && bits <= (has_meaning ? 24 : 8), "bits must be 1 to 8, or up to 24 for words");
    need(given.group >= 1 && given.group <= columns, "group must be 1 to the number of columns");
    need(given.tall >= 1 && given.tall <= rows && rows % given.tall == 0, "tall must divide the rows");
    need(given.zero >= 0 && given.zero <= 255, "zero must be 0 to 255");
    need(std::isfinite(given.gain) && std::isfinite(given.step), "gain and step must be finite");
    need(given.table.has_value() == given.levels.has_value(), "a table has both bytes and levels");
    const size_t entries = std::max<size_t>(16, size_t(1) << std::min(bits, 8));
    need(!given.table || (!given.zeros && !has_meaning && given.table->shape(0) == entries && given.levels->shape(0) == entries),
         "a table has a byte and a level for every code, at least 16 of them, and no zero points");
    CodedParts parts{{}, columns, given.codes.data(), bits <= 8 ? 1 : bits <= 16 ? 2 : 4};
    Coded &m = parts.made;
    if (given.picked) take_picked(m, *given.picked, all_columns);
    m.rows = rows, m.packing = packing_of(given.packing), m.group = given.group, m.gain = given.gain, m.step = given.step, m.zero = given.table ? 128 : given.zero;
    std::optional<Part> meaning;
    if (has_meaning) m.span = meaning.emplace("meaning", given.meaning).whole("span", 1, std::min(MOST_SPAN, columns));
    m.bits = stored_bits(bits, m.span);
    need((m.bits <= 8) == (bits <= 8) && m.bits <= 24, "codes of so many bits for so many columns have no layout");
    const size_t in_row = size_t(columns + m.span - 1) / size_t(m.span);
    need(is_matrix(given.codes, size_t(rows), in_row * size_t(parts.size)), "codes must be [rows, columns]");
    need(codes_fit(given.codes, parts.size, bits), "a code is too large for its bits");

    const int groups = (columns + given.group - 1) / given.group, down = rows / given.tall;
    take_scales(m.scales, given.kind, given.scales, given.shared, rows, groups, given.tall);
    take_less(m, given.less);
    if (given.zeros) {
        need(is_matrix(*given.zeros, size_t(down), size_t(groups)), "zeros must be [rows of blocks, groups]");
        need(bits <= 8 && fit(given.zeros->data(), given.zeros->size(), bits), "a zero point is too large for the bits of the codes");
        m.zeros = shape_of(rows, groups, given.tall, bits_that_hold(bits));
        m.zeros.fill(given.zeros->data());
    }
    if (given.table) {
        m.kind = CodeKind::table;
        std::memcpy(m.table, given.table->data(), entries);
        m.levels = copied(given.levels->data(), entries);
    }
    if (has_meaning) take_meaning(m, *meaning);
    check_packing(m);
    need(m.packing != Packing::trits || fit_trits(given.codes), "a trit is 0, 1 or 2");
    need(m.packing != Packing::uneven || fit_uneven(given.codes, m.bits - 1), "a code of an even row is too large for its bits");
    return parts;
}

}  // namespace bitpress
