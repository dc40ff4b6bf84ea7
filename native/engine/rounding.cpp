#include "rounding.h"

#include <algorithm>
#include <cmath>

#include "halves.h"

namespace bitpress {

namespace {

// Where there are other values than zeros, at least the smallest scale there is.
float kept(float scale, ScaleKind kind) {
    if (kind == ScaleKind::f32) return scale;
    const float rounded = kind == ScaleKind::f16 ? from_f16(to_f16(scale)) : from_bf16(to_bf16(scale));
    return rounded == 0.0f && scale > 0.0f ? (kind == ScaleKind::f16 ? 0x1p-24f : 0x1p-133f) : rounded;
}

}  // namespace

RoundingStep fit_step(float below, float above, const CodeRange &r) {
    const float top = float(r.top()), half = float(r.middle());
    if (!r.has_zero) return {kept(std::max(above / (half - 1.0f), below / half), r.kind), r.middle()};
    const float scale = (above + below) / top;
    const float zero = scale > 0.0f ? std::clamp(std::nearbyint(below / scale), 0.0f, top) : 0.0f;
    return {kept(scale, r.kind), int(zero)};
}

}  // namespace bitpress
