#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace bitpress {

int pick(const float *logits, int count, const std::vector<int32_t> &before, const Sampling &how, Random &random) {
    std::vector<float> changed;
    if (how.repetition_penalty != 1.0f) {
        changed.assign(logits, logits + count);
        for (int32_t token : before) {  // from the untouched logits: a token that came twice is punished once
            const float logit = logits[token];
            changed[token] = logit > 0 ? logit / how.repetition_penalty : logit * how.repetition_penalty;
        }
        logits = changed.data();
    }
    if (how.temperature == 0.0f || how.top_k == 1) return int(std::max_element(logits, logits + count) - logits);

    std::vector<int> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    auto more_likely = [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    size_t kept = order.size();
    if (how.top_k > 0 && size_t(how.top_k) < kept) kept = size_t(how.top_k);
    if (kept < order.size()) std::nth_element(order.begin(), order.begin() + std::ptrdiff_t(kept), order.end(), more_likely);
    order.resize(kept);
    const bool sorted = how.top_p < 1.0f;
    if (sorted) std::sort(order.begin(), order.end(), more_likely);

    const int best = *std::min_element(order.begin(), order.end(), more_likely);
    std::vector<double> weights(order.size());
    double total = 0;
    for (size_t i = 0; i < order.size(); ++i) {
        weights[i] = std::exp((double(logits[order[i]]) - logits[best]) / how.temperature);
        total += weights[i];
    }
    if (sorted) {  // the fewest tokens that reach top_p together, one at least
        double reached = 0;
        size_t i = 0;
        while (i < order.size() && reached < double(how.top_p) * total) reached += weights[i++];
        order.resize(std::max<size_t>(i, 1)), weights.resize(order.size());
    }
    total = 0;
    for (size_t i = 0; i < order.size(); ++i) {
        if (weights[i] < how.min_p) weights[i] = 0;  // the most likely has weight 1
        total += weights[i];
    }
    double at = random.uniform() * total;
    for (size_t i = 0; i < order.size(); ++i) {
        if (at < weights[i]) return order[i];
        at -= weights[i];
    }
    return best;
}

}  // namespace bitpress
