"""SVDQuant, the weights' side: a low-rank part of a weight is kept apart, chosen so that rounding of the rest loses little.

Source   Li et al. 2024, "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models"; the branch as in the
         authors' public code (deepcompressor, `lowrank.py`): the leading part of what rounding of the rest leaves of the weight, again
         and again, and the best of all rounds.
Differs  after the first round, a step of subspace iteration from the branch of the round before stands for a whole decomposition. Rounding
         in these rounds is to nearest with a clipping search, whatever quantizer follows; the best round has the smallest squared error
         of the weight, one of the objectives of the code. Every weight has its own branch, where weights of one input share the first
         factor in the code; the smoothing before it is a transform of the recipe, and inputs are not rounded.
Needs    nothing.       Cost  O(out * in * (min(out, in) + steps * (rank + ratios))) time; rank * (out + in) numbers stored.
Update   a b = the nearest matrix of the rank to  w - Q(w - a b);   at first to w
Fails    NumericsError when the weight is not finite or a factor is beyond the range of its type.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.factors import check_factors, factor_bytes, leading_part
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, LowRank

__all__ = ["SVDQuant"]

# Fractions of a block's range that rounding tries between the rounds.
RATIOS = tuple(1 - i / 38 for i in range(20))


@dataclass(frozen=True)
class SVDQuant:
    """`dtype` of the factors: fp16, bf16 or a number format such as int8-row. `steps`: rounds after the first."""

    rank: int = 32
    dtype: str = "fp16"
    steps: int = 20

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "a low-rank part of the weight kept apart from the codes"
    paper: ClassVar[str] = "P369"

    def __post_init__(self) -> None:
        check_factors(self.rank, self.dtype)
        if self.steps < 0:
            raise UsageError(f"steps={self.steps}: must be 0 or more.")

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> LowRank:
        w = w.float()
        a, b = leading_part(w, self.rank)
        best = LowRank.store(a, b, self.dtype)
        if not self.steps:
            return best
        branch, smallest = best, math.inf
        for step in range(self.steps + 1):
            part = branch.dequantize()
            params = fmt.fit(w - part, shrink=RATIOS)
            left = w - fmt.decode(fmt.encode(w - part, params), params)
            error = float((left - part).square().sum())
            if error < smallest:
                best, smallest = branch, error
            if step < self.steps:
                a = torch.linalg.qr(left @ b.T)[0]
                b = a.T @ left
                branch = LowRank.store(a, b, self.dtype)
        return best

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> None:
        return None
