#include "program.h"

#include <algorithm>
#include <set>

namespace bitpress {

namespace {

constexpr int GATES = -1;  // the memory of all gates, beside the numbers of outputs

// Follows which outputs have been read since all threads met.
struct Meetings {
    std::set<int> being_read;

    void operator()(Norm &) {}
    void operator()(Multiply &step) {
        step.meets = std::any_of(step.to.begin(), step.to.end(), [&](int output) { return being_read.contains(output); });
        being_read.clear();  // behind the products
    }
    void operator()(Attend &) { being_read.clear(); }
    void operator()(Gate &step) {
        step.meets = being_read.contains(GATES);
        being_read = {GATES};
    }
    void operator()(Add &step) { being_read.insert(step.of); }
};

}  // namespace

void mark_meetings(Program &program) {
    Meetings meetings;
    for (Layer &layer : program.layers) {
        for (Step &step : layer.steps) std::visit(meetings, step);
    }
}

}  // namespace bitpress
