// Words that add up to nearly a vector, one of each book, by beam search.
#pragma once

#include <cstdint>

namespace bitpress {

// `[books, count, span]` words. The `width` best beginnings of a sum are kept from book to book; the squared distance decides.
struct Books {
    const float *words;
    std::int64_t books, count, span;
};

// Writes to `[books, n]` the word of every book for each of `[n, span]` vectors; numbers that are not finite find the first words.
void beam_search(const float *vectors, std::int64_t n, const Books &books, std::int64_t width, std::int64_t *codes, int threads);

// Writes to `[2, n]` the words of two books whose sum is the nearest of all sums to each vector.
void nearest_pairs(const float *vectors, std::int64_t n, const Books &books, std::int64_t *codes, int threads);

}  // namespace bitpress
