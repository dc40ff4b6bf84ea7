#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "maps.h"

namespace bitpress {

// The steps of a map from a list of dictionaries: {"kind": "gather", "order": int32 [columns]}, {"kind": "scale", "values": float32
// [columns]} or {"kind": "mix", "block": n, "across": a, "left": float32 [a * a], "right": float32 [(n / a)^2]}; `left` only where a is
// above 1, no `right` for Walsh's matrix.
std::vector<MapStep> take_map(nanobind::handle given, const char *part, int columns);

void bind_engine(nanobind::module_ &m);
void bind_maps(nanobind::module_ &m);
void bind_models(nanobind::module_ &m);
void bind_stored(nanobind::module_ &m);

}  // namespace bitpress
