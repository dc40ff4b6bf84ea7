// How far one distribution over a vocabulary is from another, from the logits of both.
#pragma once

#include <cstdint>

namespace bitpress {

// What a row of logits p (the original's) and q (the candidate's) gives, in this order.
enum RowFigure { KL, AGREES, NLL_P, NLL_Q, ROW_FIGURES };

// Logits are [rows, vocabulary]; T is float, or uint16_t for the bits of bfloat16. `following` names each row's next token, -1 for none, whose
// negative log-likelihood is then 0. Nats. Gives whose logits are not all finite: 1 for p, 2 for q, 3 for both, 0 for neither; a row
// with such logits holds nothing of use. The same bits on every vector unit and with any number of threads.
template <typename T>
int compare_rows(const T *p, const T *q, const std::int64_t *following, double *figures, std::int64_t rows, std::int64_t vocabulary,
                 int threads);

}  // namespace bitpress
