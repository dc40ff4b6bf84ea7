"""LoRC: a low-rank term for the rounding error of a weight.

Source   Yao et al. 2023, "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank
         Compensation" (only the abstract could be read).
Differs  the singular values all stand in the second factor (`formats.terms.low_rank` says why).
Needs    nothing.                   Cost  O(out * in * min(out, in)) time; rank * (out + in) numbers stored.
Update   w_hat += a b,  a b = argmin over matrices of the rank of |w - w_hat - a b|^2
Fails    NumericsError when the weight is not finite or a factor is beyond the range of its type. It minimises the
         weight's error alone: after a quantizer that shapes its error by the gram (GPTQ), the output can get worse; use lqer there.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.factors import check_factors, factor_bytes, leading_part
from bitpress.formats import CompressedWeight, Format, LowRank

__all__ = ["LoRC"]


@dataclass(frozen=True)
class LoRC:
    """`dtype` of the factors: fp16, bf16 or a number format such as int8-row."""

    rank: int = 32
    dtype: str = "fp16"

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "a low-rank term for the weight's rounding error"
    paper: ClassVar[str] = "P177"

    def __post_init__(self) -> None:
        check_factors(self.rank, self.dtype)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> None:
        return None

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> LowRank:
        return LowRank.store(*leading_part(w - weight.dequantize(), self.rank), self.dtype)
