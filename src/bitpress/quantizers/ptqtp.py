"""PTQTP: a weight as two planes of -1, 0 and 1, each with a scale in every block, by progressive approximation.

Source   Xiao et al. 2025, "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models"; its code is not public, so
         its algorithm is taken from summaries of the paper: both planes start at the signs, scales by ridge regression that
         adapts to the condition number, digits by trying all nine pairs, at most 50 times.
Differs  the ridge is the smallest that keeps the condition number at its limit, where the paper raises it step by step. The nine
         pairs are nine sorted sums, and a search finds the nearest. A block keeps the format's own fit (the same loop from other
         starts) if that is nearer. Blocks have any shape; the paper has rows of 128 columns.
Needs    nothing.                   Cost  one sort of the weights.
Update   scales = (D'D + ridge I)^-1 D'w,  D = both planes of a block;  digits = argmin over pairs of |w - a d_1 - b d_2|
Fails    NumericsError when a weight is not finite.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.formats.table import find_grid
from bitpress.quantizers.mechanisms.two_planes import best_planes, by_block, pairs_of
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["PTQTP"]


@dataclass(frozen=True)
class PTQTP(Quantizer):
    steps: int = 50
    condition: float = 1e6

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "two ternary planes, scales by ridge regression and digits by search in turn"
    paper: ClassVar[str] = "P385"
    bits: ClassVar[tuple[float, float]] = (3.17, 4)
    # One term for both planes, or one term each: 4 bits per weight, or twice 1.6 with `base3`.
    serves: ClassVar[tuple[str, ...]] = ("trits2-*", "ternary-*")

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.condition > 1:
            raise UsageError(f"steps must be 1 or more and condition above 1, got {self.steps}, {self.condition}.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        return fmt.nbytes((shape[0] * parts, shape[1])) * (1 if fmt.grid.num_codes == 9 else 2)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("ptqtp", self.serves, fmt)
        # Both planes start at the signs: ridge regression gives each half of the mean magnitude.
        half = by_block(w, fmt).abs().mean(1, keepdim=True) / 2
        planes = fmt if fmt.grid.num_codes == 9 else Format(find_grid("trits2"), fmt.block, fmt.scale)
        outcome = best_planes(w, planes, [half.expand(-1, 2)], self.steps, self.condition)
        return outcome if planes is fmt else Outcome(_apart(outcome.weight, fmt), outcome.fallbacks, outcome.figures)


def _apart(weight: CompressedWeight, fmt: Format) -> CompressedWeight:
    """Return two terms of one plane each for a term of two planes."""
    both = weight.terms[0]
    assert isinstance(both, Packed)
    codes, params = both.unpack()
    digits = pairs_of(both.format).to(codes.device)[codes.long()]
    scales = [fmt.stored({"scale": params["scale"][..., plane]}) for plane in range(2)]
    return CompressedWeight(tuple(Packed.pack(fmt, (digits[..., k] + 1).to(torch.uint8), scales[k]) for k in range(2)))
