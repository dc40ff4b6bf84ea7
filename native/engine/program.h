// What the layers of a decoder do: lists of steps, described by Python and checked by the binding.
//
// Steps work on the residual stream and on values. An input is rows that products read, rounded once for all of them; an output is rows
// that products made, [row][features of the layer]. Values are numbered, and a number serves in every layer again.
#pragma once

#include <variant>
#include <vector>

#include "matrix.h"

namespace bitpress {

// input = RMS norm of the stream
struct Norm {
    std::vector<float> weight;
    int to = 0;
};

// outputs = an input times each of these
struct Multiply {
    int of = 0;
    std::vector<const Linear *> linears;
    std::vector<int> to;
    bool meets = false;  // see mark_meetings
};

// input = attention; queries and keys are rotated, keys and values join the cache
struct Attend {
    int queries = 0, keys = 0, values = 0, to = 0;
    std::vector<float> q_norm, k_norm;  // of every head, where there are such
    int rope = 0;                       // which rotation, or -1 for none
    int window = 0;                     // positions that attention looks back on, itself included; 0: all
    int cache = 0;                      // which part of the cache is its own
};

// input = act(gate @ input) * (up @ input)
struct Gate {
    int of = 0, to = 0;
    const Linear *gate = nullptr, *up = nullptr;
    bool meets = false;
};

// stream += output, or its norm
struct Add {
    int of = 0;
    std::vector<float> norm;
};

using Step = std::variant<Norm, Multiply, Attend, Gate, Add>;

struct Layer {
    std::vector<Step> steps;
    std::vector<std::vector<const Linear *>> readers;  // by input: the layers whose products read it
};

struct Program {
    std::vector<Layer> layers;
    int inputs = 0;
    std::vector<int> outputs;  // the widest of every number
    int inner = 0;             // the widest gate
    int attentions = 0;
};

// Threads that run a single token meet behind products only. Marks the steps that write what another thread may still be reading.
void mark_meetings(Program &program);

}  // namespace bitpress
