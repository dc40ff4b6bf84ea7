#include "trellis.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
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
// A thread with fewer states of a path waits longer for the others than it computes.
constexpr std::int64_t kStatesEach = 1 << 12;

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

// Costs of some states after one value: those of the groups first .. last, whole vectors of them. A state s is reached from the 2^shift states  j << (state_bits - shift) | s >> shift;
// `back` keeps the best j for every s >> shift.
template <int shift>
inline __attribute__((always_inline)) void step(const float *cost, float *next, std::uint8_t *back, const float *levels, std::int64_t states,
                                                std::int64_t first, std::int64_t last, float value, float weight) {
    constexpr int branches = 1 << shift;
    const std::int64_t groups = states >> shift;
    const Floats x = Floats{} + value, w = Floats{} + weight;
    for (std::int64_t group = first; group < last; group += kLanes) {
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
                const Floats repeated = __builtin_shuffle(least, lane * (kLanes / branches) + kRepeated<branches>);
                const Floats off = x - load(level + lane * kLanes);
                const Floats sum = repeated + w * (off * off);
                std::memcpy(out + lane * kLanes, &sum, sizeof sum);
            }
        }
    }
}
#else
template <int shift>
void step(const float *cost, float *next, std::uint8_t *back, const float *levels, std::int64_t states, std::int64_t first, std::int64_t last,
          float value, float weight) {
    const std::int64_t groups = states >> shift;
    for (std::int64_t group = first; group < last; ++group) {
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

#define BITPRESS_STEP(shift)                                                                                                      \
    EVERY_VECTOR_UNIT                                                                                                             \
    void step_##shift(const float *cost, float *next, std::uint8_t *back, const float *levels, std::int64_t states,              \
                      std::int64_t first, std::int64_t last, float value, float weight) {                                        \
        step<shift>(cost, next, back, levels, states, first, last, value, weight);                                               \
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

using Step = void (*)(const float *, float *, std::uint8_t *, const float *, std::int64_t, std::int64_t, std::int64_t, float, float);
constexpr Step kSteps[kMostShift] = {step_1, step_2, step_3, step_4, step_5, step_6, step_7, step_8};

// What a path needs; kept between paths, since fresh memory costs more than the search of small trellises.
struct Workspace {
    std::vector<float> cost, next;
    std::vector<std::uint8_t> back;
    std::vector<std::int64_t> start;  // of the entries of every value in `back`
    std::vector<float> least;         // the smallest cost of each thread's states

    void fit(const Trellis &trellis, std::int64_t length, int threads) {
        const auto states = std::size_t{1} << trellis.state_bits;
        cost.resize(states), next.resize(states), start.resize(static_cast<std::size_t>(length)), least.resize(static_cast<std::size_t>(threads));
        std::int64_t total = 0;
        for (std::int64_t i = 0; i < length; ++i) {
            start[static_cast<std::size_t>(i)] = total;
            total += static_cast<std::int64_t>(states) >> trellis.shifts[i % trellis.period];
        }
        back.resize(static_cast<std::size_t>(total));
    }
};

// The threads of one path, which meet after every value.
class Meeting {
  public:
    explicit Meeting(int threads) : threads_(threads) {}
    void wait() {
        if (threads_ == 1) return;
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        // Spins, giving the processor away now and then: another thread may need this very core to get there.
        for (int turn = 1; round_.load(std::memory_order_acquire) == round; ++turn) {
            if (turn % 1024 == 0) sched_yield();
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }

  private:
    const int threads_;
    std::atomic<int> arrived_{0}, round_{0};
};

// One path on some threads, of which this is the one of that `rank`.
struct Search {
    const Trellis &trellis;
    Workspace &work;
    Meeting &meeting;
    int threads, rank;

    std::int64_t share(std::int64_t vectors, int of) const { return vectors * of / threads * kLanes; }

    void forward(const float *values, const float *weights, std::int64_t length) const {
        const std::int64_t states = std::int64_t{1} << trellis.state_bits;
        // Every thread has its own view of the two arrays, which take turns.
        float *cost = work.cost.data(), *next = work.next.data();
        const std::int64_t first = share(states / kLanes, rank), last = share(states / kLanes, rank + 1);
        std::fill(cost + first, cost + last, kUnreached);
        if (rank == 0) cost[0] = 0.0f;
        meeting.wait();
        for (std::int64_t i = 0; i < length; ++i) {
            const int shift = trellis.shifts[i % trellis.period];
            const std::int64_t vectors = (states >> shift) / kLanes;
            kSteps[shift - 1](cost, next, work.back.data() + work.start[static_cast<std::size_t>(i)], trellis.levels, states, share(vectors, rank),
                              share(vectors, rank + 1), values[i], weights == nullptr ? 1.0f : weights[i]);
            std::swap(cost, next);
            meeting.wait();
            if (i % kRebase == kRebase - 1) {
                work.least[static_cast<std::size_t>(rank)] = *std::min_element(cost + first, cost + last);
                meeting.wait();
                const float least = *std::min_element(work.least.begin(), work.least.end());
                for (std::int64_t s = first; s < last; ++s) cost[s] -= least;
                meeting.wait();
            }
        }
    }

    void backward(std::uint8_t *codes, std::int64_t length) const {
        const std::vector<float> &cost = length % 2 == 0 ? work.cost : work.next;
        std::int64_t state = std::min_element(cost.begin(), cost.end()) - cost.begin();
        for (std::int64_t i = length - 1; i >= 0; --i) {
            const int shift = trellis.shifts[i % trellis.period];
            codes[i] = static_cast<std::uint8_t>(state & ((1 << shift) - 1));
            const std::int64_t group = state >> shift;
            const std::int64_t from = work.back[static_cast<std::size_t>(work.start[static_cast<std::size_t>(i)] + group)];
            state = group | from << (trellis.state_bits - shift);
        }
    }
};

}  // namespace

void encode_trellis(const float *values, const float *weights, std::uint8_t *codes, std::int64_t sequences, std::int64_t length,
                    const Trellis &trellis, int threads) {
    const std::int64_t states = std::int64_t{1} << trellis.state_bits;
    const std::int64_t useful = std::max<std::int64_t>(1, states / kStatesEach);
    const int together = static_cast<int>(std::clamp<std::int64_t>(threads / std::max<std::int64_t>(1, sequences), 1, useful));
    const int teams = static_cast<int>(std::clamp<std::int64_t>(threads / together, 1, std::max<std::int64_t>(1, sequences)));
    // Kept from call to call: columns with feedback come one at a time.
    static thread_local std::vector<Workspace> works;
    works.resize(std::max(works.size(), static_cast<std::size_t>(teams)));
    Workspace *all = works.data();
    // Here and not in the threads: one that failed would leave the others waiting.
    for (int team = 0; team < teams; ++team) all[team].fit(trellis, length, together);
    std::deque<Meeting> meetings;
    for (int team = 0; team < teams; ++team) meetings.emplace_back(together);
    parallel(teams * together, [&](int index) {
        const int team = index / together, rank = index % together;
        const Search search{trellis, all[team], meetings[static_cast<std::size_t>(team)], together, rank};
        for (std::int64_t s = sequences * team / teams; s < sequences * (team + 1) / teams; ++s) {
            search.forward(values + s * length, weights == nullptr ? nullptr : weights + s * length, length);
            if (rank == 0) search.backward(codes + s * length, length);
            search.meeting.wait();
        }
    });
}

}  // namespace bitpress
