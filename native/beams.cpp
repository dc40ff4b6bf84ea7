#include "beams.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "share.h"
#include "vector_units.h"

namespace bitpress {

namespace {

constexpr std::int64_t kLanes = 16;
constexpr float kBeyond = std::numeric_limits<float>::infinity();

// A book as it is scored: number by number, words side by side, filled up with words that are never the nearest.
struct Turned {
    std::vector<float> words;   // [span, padded]
    std::vector<float> halves;  // half of each word's square
};

std::vector<Turned> turn(const Books &books, std::int64_t padded) {
    std::vector<Turned> turned(static_cast<std::size_t>(books.books));
    for (std::int64_t m = 0; m < books.books; ++m) {
        Turned &book = turned[static_cast<std::size_t>(m)];
        book.words.assign(static_cast<std::size_t>(books.span * padded), 0.0f);
        book.halves.assign(static_cast<std::size_t>(padded), kBeyond);
        for (std::int64_t i = 0; i < books.count; ++i) {
            const float *word = books.words + (m * books.count + i) * books.span;
            float square = 0.0f;
            for (std::int64_t d = 0; d < books.span; ++d) {
                book.words[static_cast<std::size_t>(d * padded + i)] = word[d];
                square += word[d] * word[d];
            }
            book.halves[static_cast<std::size_t>(i)] = square / 2;
        }
    }
    return turned;
}

// Sixteen numbers side by side, in as many registers as a vector unit takes for them.
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Places = std::int32_t __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

__attribute__((always_inline)) inline void score_lanes(Lanes &sums, const float *left, std::int64_t span, const float *words,
                                                       const float *halves, std::int64_t padded, std::int64_t i) {
    Lanes line;
    std::memcpy(&sums, halves + i, sizeof(sums));
    for (std::int64_t d = 0; d < span; ++d) {
        std::memcpy(&line, words + d * padded + i, sizeof(line));
        sums -= left[d] * line;
    }
}

// Half the squared distance from every word but for the vector's own half square.
EVERY_VECTOR_UNIT
void score(const float *left, std::int64_t span, const float *words, const float *halves, std::int64_t padded, float *scores) {
    for (std::int64_t i = 0; i < padded; i += kLanes) {
        Lanes sums;
        score_lanes(sums, left, span, words, halves, padded, i);
        std::memcpy(scores + i, &sums, sizeof(sums));
    }
}

// The word of the least score, the first of several.
EVERY_VECTOR_UNIT
std::int64_t least_score(const float *left, std::int64_t span, const float *words, const float *halves, std::int64_t padded) {
    Lanes sums, least;
    score_lanes(least, left, span, words, halves, padded, 0);
    Places places = {};
    for (std::int64_t i = kLanes; i < padded; i += kLanes) {
        score_lanes(sums, left, span, words, halves, padded, i);
        const Places better = sums < least;
        least = better ? sums : least;
        places = better ? Places{} + static_cast<std::int32_t>(i) : places;
    }
    std::int64_t best = 0;
    for (std::int64_t k = 1; k < kLanes; ++k) {
        if (least[k] < least[best] || (least[k] == least[best] && places[k] + k < places[best] + best)) best = k;
    }
    return places[best] + best;
}

float half_square(const float *x, std::int64_t span) {
    float sum = 0.0f;
    for (std::int64_t d = 0; d < span; ++d) sum += x[d] * x[d];
    return sum / 2;
}

struct Beginning {
    std::int64_t before, word;
};

// What one thread needs to search for one vector after the other.
class Beam {
  public:
    Beam(const Books &books, const std::vector<Turned> &turned, std::int64_t padded, std::int64_t width)
        : books_(books), turned_(turned), padded_(padded), width_(width), scores_(static_cast<std::size_t>(padded)),
          lefts_(static_cast<std::size_t>(width * books.span)), next_(lefts_.size()),
          codes_(static_cast<std::size_t>(width * books.books)), next_codes_(codes_.size()),
          errors_(static_cast<std::size_t>(width)), best_(errors_.size()) {}

    // Writes the codes of one vector, `apart` from one book to the next.
    void find(const float *vector, std::int64_t *codes, std::int64_t apart) {
        const std::int64_t span = books_.span, last = books_.books - 1;
        std::copy(vector, vector + span, lefts_.begin());
        std::int64_t kept = 1;
        for (std::int64_t m = 0; m < last; ++m) kept = extend(m, kept);
        float error = kBeyond;
        std::int64_t winner = 0, word = 0;
        for (std::int64_t k = 0; k < kept; ++k) {
            const float *left = lefts_.data() + k * span;
            const std::int64_t i = nearest(left, last);
            const float *there = books_.words + (last * books_.count + i) * span;
            float square = 0.0f;
            for (std::int64_t d = 0; d < span; ++d) square += (left[d] - there[d]) * (left[d] - there[d]);
            if (square < error) error = square, winner = k, word = i;
        }
        for (std::int64_t m = 0; m < last; ++m) codes[m * apart] = codes_[static_cast<std::size_t>(winner * books_.books + m)];
        codes[last * apart] = word;
    }

  private:
    std::int64_t nearest(const float *left, std::int64_t m) const {
        const Turned &book = turned_[static_cast<std::size_t>(m)];
        const std::int64_t found = least_score(left, books_.span, book.words.data(), book.halves.data(), padded_);
        return std::min(found, books_.count - 1);
    }

    // Keeps the best of all beginnings with a word of book `m` behind; gives their number.
    std::int64_t extend(std::int64_t m, std::int64_t kept) {
        const std::int64_t span = books_.span, wanted = std::min(width_, kept * books_.count);
        const Turned &book = turned_[static_cast<std::size_t>(m)];
        errors_.assign(static_cast<std::size_t>(wanted), kBeyond);
        worst_ = 0;
        std::int64_t filled = 0;
        for (std::int64_t k = 0; k < kept; ++k) {
            const float *left = lefts_.data() + k * span;
            const float own = half_square(left, span);
            score(left, span, book.words.data(), book.halves.data(), padded_, scores_.data());
            for (std::int64_t i = 0; i < books_.count; ++i) {
                const float error = own + scores_[static_cast<std::size_t>(i)];
                if (filled < wanted) {
                    errors_[static_cast<std::size_t>(filled)] = error;
                    best_[static_cast<std::size_t>(filled)] = {k, i};
                    if (++filled == wanted) find_worst();
                } else if (error < errors_[worst_]) {
                    replace(error, k, i);
                }
            }
        }
        for (std::int64_t at = 0; at < wanted; ++at) {
            const auto &[before, word] = best_[static_cast<std::size_t>(at)];
            const float *left = lefts_.data() + before * span, *there = books_.words + (m * books_.count + word) * span;
            float *to = next_.data() + at * span;
            for (std::int64_t d = 0; d < span; ++d) to[d] = left[d] - there[d];
            const auto from = codes_.begin() + before * books_.books;
            const auto into = next_codes_.begin() + at * books_.books;
            std::copy(from, from + m, into);
            into[m] = word;
        }
        lefts_.swap(next_);
        codes_.swap(next_codes_);
        return wanted;
    }

    // Takes the place of the worst, which is looked for anew: fewer steps than keeping all in order.
    void replace(float error, std::int64_t before, std::int64_t word) {
        errors_[worst_] = error;
        best_[worst_] = {before, word};
        find_worst();
    }

    void find_worst() {
        worst_ = static_cast<std::size_t>(std::max_element(errors_.begin(), errors_.end()) - errors_.begin());
    }

    const Books &books_;
    const std::vector<Turned> &turned_;
    std::int64_t padded_, width_;
    std::vector<float> scores_, lefts_, next_;
    std::vector<std::int64_t> codes_, next_codes_;
    std::vector<float> errors_;
    std::vector<Beginning> best_;
    std::size_t worst_ = 0;
};

// What every sum of two words adds to half its square beyond the halves of both: their product.
struct Products {
    Products(const Books &books, const std::vector<Turned> &turned, std::int64_t padded)
        : all(static_cast<std::size_t>(books.count * padded)), least(static_cast<std::size_t>(books.count), kBeyond) {
        for (std::int64_t i = 0; i < books.count; ++i) {
            const float *word = books.words + i * books.span;
            float *row = all.data() + i * padded;
            for (std::int64_t d = 0; d < books.span; ++d) {
                const float *line = turned[1].words.data() + d * padded;
                for (std::int64_t j = 0; j < padded; ++j) row[j] += word[d] * line[j];
            }
            for (std::int64_t j = 0; j < books.count; ++j) least[static_cast<std::size_t>(i)] = std::min(least[static_cast<std::size_t>(i)], row[j]);
        }
    }
    std::vector<float> all, least;  // [count, padded]; the least of each row
};

// The least of scores with a row of products added.
EVERY_VECTOR_UNIT
float least_sum(const float *scores, const float *products, std::int64_t padded) {
    Lanes least, one, other;
    std::memcpy(&least, scores, sizeof(least));
    std::memcpy(&other, products, sizeof(other));
    least += other;
    for (std::int64_t j = kLanes; j < padded; j += kLanes) {
        std::memcpy(&one, scores + j, sizeof(one));
        std::memcpy(&other, products + j, sizeof(other));
        one += other;
        least = one < least ? one : least;
    }
    float lowest = least[0];
    for (std::int64_t k = 1; k < kLanes; ++k) lowest = least[k] < lowest ? least[k] : lowest;
    return lowest;
}

// Finds the nearest of all sums; words of the first book that no word of the second can make the nearest are passed over.
class Pairs {
  public:
    Pairs(const Books &books, const std::vector<Turned> &turned, const Products &products, std::int64_t padded)
        : books_(books), turned_(turned), products_(products), padded_(padded), first_(static_cast<std::size_t>(padded)),
          second_(first_.size()) {}

    void find(const float *vector, std::int64_t *codes, std::int64_t apart) {
        score(vector, books_.span, turned_[0].words.data(), turned_[0].halves.data(), padded_, first_.data());
        score(vector, books_.span, turned_[1].words.data(), turned_[1].halves.data(), padded_, second_.data());
        const float lowest = *std::min_element(second_.begin(), second_.begin() + books_.count);
        std::int64_t start = 0;
        for (std::int64_t i = 1; i < books_.count; ++i) start = bound(i) < bound(start) ? i : start;
        float least = row(start);
        std::int64_t best = start;
        for (std::int64_t i = 0; i < books_.count; ++i) {
            if (i == start || !(bound(i) + lowest < least)) continue;
            const float found = row(i);
            if (found < least) least = found, best = i;
        }
        codes[0] = best;
        codes[apart] = place(best);
    }

  private:
    float bound(std::int64_t i) const {
        return first_[static_cast<std::size_t>(i)] + products_.least[static_cast<std::size_t>(i)];
    }

    float row(std::int64_t i) const {
        return first_[static_cast<std::size_t>(i)] + least_sum(second_.data(), products_.all.data() + i * padded_, padded_);
    }

    std::int64_t place(std::int64_t i) const {
        const float *products = products_.all.data() + i * padded_;
        std::int64_t best = 0;
        for (std::int64_t j = 1; j < books_.count; ++j) {
            if (second_[static_cast<std::size_t>(j)] + products[j] < second_[static_cast<std::size_t>(best)] + products[best]) best = j;
        }
        return best;
    }

    const Books &books_;
    const std::vector<Turned> &turned_;
    const Products &products_;
    std::int64_t padded_;
    std::vector<float> first_, second_;
};

}  // namespace

void nearest_pairs(const float *vectors, std::int64_t n, const Books &books, std::int64_t *codes, int threads) {
    const std::int64_t padded = (books.count + kLanes - 1) / kLanes * kLanes;
    const std::vector<Turned> turned = turn(books, padded);
    const Products products(books, turned, padded);
    share(n, books.count * kLanes, threads, [&](std::int64_t first, std::int64_t last) {
        Pairs pairs(books, turned, products, padded);
        for (std::int64_t i = first; i < last; ++i) pairs.find(vectors + i * books.span, codes + i, n);
    });
}

void beam_search(const float *vectors, std::int64_t n, const Books &books, std::int64_t width, std::int64_t *codes, int threads) {
    const std::int64_t padded = (books.count + kLanes - 1) / kLanes * kLanes;
    const std::vector<Turned> turned = turn(books, padded);
    share(n, books.count * books.books, threads, [&](std::int64_t first, std::int64_t last) {
        Beam beam(books, turned, padded, width);
        for (std::int64_t i = first; i < last; ++i) beam.find(vectors + i * books.span, codes + i, n);
    });
}

}  // namespace bitpress
