"""MR-GPTQ: GPTQ for the 4-bit floats with small blocks, MXFP4 and NVFP4, after a Hadamard rotation inside every block.

Source   Egiazarian et al. 2025, "Bridging the Gap Between Promise and Performance for Microscaling FP4 Quantization" (its abstract);
         scale search, static scales and activation order as in the authors' public code (FP-Quant, `gptq.py`, `quantizer.py`).
         The rotation is the transform `hadamard` with block: group, done before.
Differs  the scale search weighs squared errors by the gram's diagonal, where the code takes the power 2.4 of plain errors. It tries
         ranges from 1/2 to 13/8 of the full one, not from 1/5 to 1: a block whose largest weight is at 4 instead of 6 does not use
         the gap between the two. For powers of two it tries one up and one down. The code multiplies all scales of MXFP4 by a
         constant 4/3; here `row_factors` is the number of factors from 1 to 2 that are tried for every row, stored as an output map
         of one float32 per row (1, the default: no map, plain MXFP4). Signs in the rotation are random.
Needs    gram [in, in] float32.     Cost  as GPTQ.
Update   factor, scale = argmin of sum gram[j, j] (w - Q(w / factor; scale) * factor)^2;  then GPTQ's, columns by falling gram[j, j]
Fails    as GPTQ; FormatError for other formats.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Scale
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["MRGPTQ"]

# Fractions of a block's range, the full one first.
RATIOS = (1.0, *(1 + i / 16 for i in range(-8, 11) if i))
POWERS = (1.0, 2.0, 0.5)


@dataclass(frozen=True)
class MRGPTQ(Quantizer):
    row_factors: int = 1
    damp: float = 0.01
    order: Order = "activation"
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[dict[str, Any], ...]] = ({"name": "hadamard", "block": "group"},)
    summary: ClassVar[str] = "GPTQ with a scale search for MXFP4 and NVFP4, after a Hadamard rotation of every block"
    paper: ClassVar[str] = "P438"
    bits: ClassVar[tuple[float, float]] = (4, 4)
    native_loops: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("e2m1-*", "mxfp4-*")

    def __post_init__(self) -> None:
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if not 1 <= self.row_factors <= 64:
            raise UsageError(f"row_factors={self.row_factors}: must be 1 (none) to 64.")

    @property
    def keeps_map(self) -> bool:
        return self.row_factors > 1

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("mr_gptq", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("mr_gptq")
        w = w.float()
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        ratios = POWERS if fmt.scale == "e8m0" else RATIOS
        factor = self._row_factor(w, fmt, feedback.importance, ratios) if self.row_factors > 1 else None
        inner = w if factor is None else w / factor[:, None]
        columns = Columns(fmt, inner, feedback.importance, ratios, static=True)
        columns.round_(feedback.order, feedback.factor, self.lazy)
        weight = CompressedWeight((Packed.pack(fmt, columns.codes, columns.params),))
        if factor is not None:
            weight = CompressedWeight(weight.terms, output_map=Scale(factor))
        return Outcome(weight, feedback.fallbacks, {"damp": feedback.damp or 0.0})

    def _row_factor(
        self, w: torch.Tensor, fmt: Format, importance: torch.Tensor, ratios: tuple[float, ...]
    ) -> Float[torch.Tensor, " out"]:
        """Return the factor from 1 to 2 with the least rounding error for every row."""
        best = torch.ones(w.shape[0], device=w.device)
        least = torch.full((w.shape[0],), torch.inf, device=w.device)
        for i in range(self.row_factors):
            factor = 2.0 ** (i / self.row_factors)
            params = fmt.fit(w / factor, importance, ratios)
            difference = fmt.decode(fmt.encode(w / factor, params), params).mul_(factor).sub_(w)
            error = (difference.square_() * importance).sum(1)
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
        return best
