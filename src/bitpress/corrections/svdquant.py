"""SVDQuant, the weights' side: the leading singular part of a weight is kept apart, and the rest is quantized.

Source   Li et al. 2024, "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models"; the branch as in the
         authors' public code (deepcompressor, `lowrank.py`, without its iterations).
Differs  every weight has its own branch, where weights of one input share the first factor in the public code; the smoothing before
         it is a transform of the recipe.
Needs    nothing.                   Cost  O(out * in * min(out, in)) time; rank * (out + in) numbers stored.
Update   w = a b + rest,  a b = the nearest matrix of the rank;  w_hat = a b + Q(rest)
Fails    NumericsError when the weight is not finite or a factor is beyond the range of its type.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.factors import check_factors, factor_bytes, leading_part
from bitpress.formats import CompressedWeight, LowRank

__all__ = ["SVDQuant"]


@dataclass(frozen=True)
class SVDQuant:
    """`dtype` of the factors: fp16, bf16 or a number format such as int8-row."""

    rank: int = 32
    dtype: str = "fp16"

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "a low-rank part of the weight kept apart from the codes"
    paper: ClassVar[str] = "P369"

    def __post_init__(self) -> None:
        check_factors(self.rank, self.dtype)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None) -> LowRank:
        return LowRank.store(*leading_part(w, self.rank), self.dtype)

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> None:
        return None
