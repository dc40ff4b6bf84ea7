// Weights in ranges, one for each thread that is worth starting.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu.h"

namespace bitpress {

// Below this many weights a second thread costs more than it saves.
constexpr std::int64_t kShare = 1 << 16;

// Calls work(first, last) for as many equal ranges of [0, items) as there are threads for; an item is `weights` weights.
template <typename Work>
void share(std::int64_t items, std::int64_t weights, int threads, const Work &work) {
    const std::int64_t useful = std::max<std::int64_t>(1, items * weights / kShare);
    const std::int64_t used = std::min<std::int64_t>({static_cast<std::int64_t>(threads), useful, std::max<std::int64_t>(items, 1)});
    parallel(static_cast<int>(used), [&](int index) { work(items * index / used, items * (index + 1) / used); });
}

}  // namespace bitpress
