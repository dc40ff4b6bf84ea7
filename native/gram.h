// gram += x.T @ x and sum += a.T @ b for bf16 inputs, added up in float32 by AMX tiles.
#pragma once

#include <cstdint>

namespace bitpress {

// gram [padded, padded] float32, padded a multiple of 32 and at least n: tiles of 32 x 32 on and above the diagonal are added to,
// those below it are left alone. x [tokens, n] holds the bits of bf16 values. Only where has_amx_bf16().
// The order of additions does not depend on `threads`.
void add_gram(float *gram, std::int64_t padded, const std::uint16_t *x, std::int64_t tokens, std::int64_t n, int threads);

// sum [padded, padded] as above, every tile of it; a and b [tokens, n] are two matrices.
void add_product(float *sum, std::int64_t padded, const std::uint16_t *a, const std::uint16_t *b, std::int64_t tokens,
                 std::int64_t n, int threads);

}  // namespace bitpress
