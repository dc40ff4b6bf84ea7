#include "trellis.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "vector_units.h"

namespace bitpress {

namespace {

// States that are handled together.
constexpr int kLanes = 8;
// The costs of all states are brought back to a minimum of 0 after this many values, so that float32 keeps its digits.
constexpr std::int64_t kRebase = 64;
constexpr float kUnreached = 1e30f;

#if defined(__GNUC__) && !defined(__clang__)
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));

inline __attribute__((always_inline)) Floats load(const float *from) {
    Floats lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

// Lane i of a repeated vector holds lane i / branches of the original.
template <int branches>
constexpr Ints kRepeated = {0, 1 / branches, 2 / branches, 3 / branches, 4 / branches, 5 / branches, 6 / branches, 7 / branches};

// Costs of the states after one value. A state s is reached from the 2^shift states  j << (state_bits - shift) | s >> shift;
// `back` keeps the best j for every s >> shift.
template <int shift>
inline __attribute__((always_inline)) void step(const float *cost, float *next, std::uint8_t *back, const float *levels, std::int64_t states,
                                                float value, float weight) {
    constexpr int branches = 1 << shift;
    const std::int64_t groups = states >> shift;
    const Floats x = Floats{} + value, w = Floats{} + weight;
    for (std::int64_t group = 0; group < groups; group += kLanes) {
        Floats least = load(cost + group);
        Ints from = Ints{};
        for (int j = 1; j < branches; ++j) {
            const Floats other = load(cost + j * groups + group);
            const Ints lower = other < least;
            from = lower ? (Ints{} + j) : from;
            least = lower ? other : least;
        }
        const Bytes best = __builtin_convertvector(from, Bytes);
        std::memcpy(back + group, &best, sizeof best);
        const float *level = levels + (group << shift);
        float *out = next + (group << shift);
        for (int lane = 0; lane < kLanes; ++lane) {
            if constexpr (branches >= kLanes) {
                for (int j = 0; j < branches; j += kLanes) {
                    const Floats off = x - load(level + lane * branches + j);
                    const Floats sum = least[lane] + w * (off * off);
                    std::memcpy(out + lane * branches + j, &sum, sizeof sum);
                }
            } else if (lane < branches) {  // the costs of 8 / branches groups, each repeated for its branches
                const int first = lane * (kLanes / branches);
                const Floats repeated = __builtin_shuffle(least, first + kRepeated<branches>);
                const Floats off = x - load(level + lane * kLanes);
                const Floats sum = repeated + w * (off * off);
                std::memcpy(out + lane * kLanes, &sum, sizeof sum);
            }
        }
    }
}
#else
template <int shift>
void step(const float *cost, float *next, std::uint8_t *back, const float *levels, std::int64_t states, float value, float weight) {
    const std::int64_t groups = states >> shift;
    for (std::int64_t group = 0; group < groups; ++group) {
        int from = 0;
        for (int j = 1; j < 1 << shift; ++j)
            if (cost[j * groups + group] < cost[from * groups + group]) from = j;
        back[group] = static_cast<std::uint8_t>(from);
        for (std::int64_t s = group << shift; s < (group + 1) << shift; ++s) {
            const float off = value - levels[s];
            next[s] = cost[from * groups + group] + weight * (off * off);
        }
    }
}
#endif

#define BITPRESS_STEP(shift)                                                                                                     \
    EVERY_VECTOR_UNIT                                                                                                            \
    void step_##shift(const float *cost, float *next, std::uint8_t *back, const float *levels, std::int64_t states, float value, \
                      float weight) {                                                                                            \
        step<shift>(cost, next, back, levels, states, value, weight);                                                            \
    }
BITPRESS_STEP(1)
BITPRESS_STEP(2)
BITPRESS_STEP(3)
BITPRESS_STEP(4)
BITPRESS_STEP(5)
BITPRESS_STEP(6)
BITPRESS_STEP(7)
BITPRESS_STEP(8)
#undef BITPRESS_STEP

using Step = void (*)(const float *, float *, std::uint8_t *, const float *, std::int64_t, float, float);
constexpr Step kSteps[kMostShift] = {step_1, step_2, step_3, step_4, step_5, step_6, step_7, step_8};

// What one thread needs for a sequence; kept between sequences, since fresh memory costs more than the search of small trellises.
struct Workspace {
    std::vector<float> cost, next;
    std::vector<std::uint8_t> back;
    std::vector<std::int64_t> start;  // of the entries of every value in `back`
};

void search(const float *values, const float *weights, std::uint8_t *codes, std::int64_t length, const Trellis &trellis, Workspace &work) {
    const std::int64_t states = std::int64_t{1} << trellis.state_bits;
    std::fill(work.cost.begin(), work.cost.end(), kUnreached);
    work.cost[0] = 0.0f;
    for (std::int64_t i = 0; i < length; ++i) {
        const int shift = trellis.shifts[i % trellis.period];
        kSteps[shift - 1](work.cost.data(), work.next.data(), work.back.data() + work.start[static_cast<std::size_t>(i)], trellis.levels,
                          states, values[i], weights == nullptr ? 1.0f : weights[i]);
        std::swap(work.cost, work.next);
        if (i % kRebase == kRebase - 1) {
            const float least = *std::min_element(work.cost.begin(), work.cost.end());
            for (float &cost : work.cost) cost -= least;
        }
    }
    std::int64_t state = std::min_element(work.cost.begin(), work.cost.end()) - work.cost.begin();
    for (std::int64_t i = length - 1; i >= 0; --i) {
        const int shift = trellis.shifts[i % trellis.period];
        codes[i] = static_cast<std::uint8_t>(state & ((1 << shift) - 1));
        const std::int64_t group = state >> shift;
        const std::int64_t from = work.back[static_cast<std::size_t>(work.start[static_cast<std::size_t>(i)] + group)];
        state = group | from << (trellis.state_bits - shift);
    }
}

}  // namespace

void encode_trellis(const float *values, const float *weights, std::uint8_t *codes, std::int64_t sequences, std::int64_t length,
                    const Trellis &trellis, int threads) {
    const std::int64_t states = std::int64_t{1} << trellis.state_bits;
    const int used = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, sequences)));
    parallel(used, [&](int index) {
        static thread_local Workspace work;
        work.cost.resize(static_cast<std::size_t>(states));
        work.next.resize(static_cast<std::size_t>(states));
        work.start.resize(static_cast<std::size_t>(length));
        std::int64_t total = 0;
        for (std::int64_t i = 0; i < length; ++i) {
            work.start[static_cast<std::size_t>(i)] = total;
            total += states >> trellis.shifts[i % trellis.period];
        }
        work.back.resize(static_cast<std::size_t>(total));
        for (std::int64_t s = sequences * index / used; s < sequences * (index + 1) / used; ++s)
            search(values + s * length, weights == nullptr ? nullptr : weights + s * length, codes + s * length, length, trellis, work);
    });
}

}  // namespace bitpress
