// What the machine could do at best, measured: reading memory, and multiplying bytes.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "kernels.h"
#include "pool.h"

namespace bitpress {

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

double measure_reading(size_t bytes, int threads) {
    Aligned<uint64_t> memory(bytes / 8);
    std::memset(memory.data(), 1, memory.bytes());
    Pool pool(threads);
    std::vector<uint64_t> sums(size_t(threads) * 8);
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        const double start = seconds();
        pool.run([&](int thread) {
            const size_t from = memory.size() * size_t(thread) / threads, to = memory.size() * size_t(thread + 1) / threads;
            uint64_t a = 0, b = 0, c = 0, d = 0;
            for (size_t i = from; i + 32 <= to; i += 32) {  // one word of each cache line is enough to read the line
                a += memory[i], b += memory[i + 8], c += memory[i + 16], d += memory[i + 24];
            }
            sums[size_t(thread) * 8] = a + b + c + d;
        });
        best = std::max(best, double(memory.bytes()) / (seconds() - start));
    }
    asm volatile("" : : "r"(sums.data()) : "memory");
    return best;
}

double measure_multiplying(const Kernels &kernels, int threads) {
    Pool pool(threads);
    std::vector<double> rates;
    const int repeats = kernels.peak_repeats;
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        const double start = seconds();
        pool.run([&](int) { kernels.peak(repeats); });
        best = std::max(best, double(repeats) * kernels.peak_operations * threads / (seconds() - start));
    }
    return best;
}

}  // namespace bitpress
