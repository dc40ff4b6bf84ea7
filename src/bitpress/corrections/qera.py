"""QERA: the low-rank term that leaves the smallest error of the layer's output.

Source   Zhang et al. 2024, "QERA: an Analytical Framework for Quantization Error Reconstruction", known here from summaries and from the
         authors' public code (`approximate.py`): the error is decomposed behind the square root of the inputs' gram, which is divided
         out again. LQER has the root of the diagonal in its place.
Differs  nothing is divided: the second factor is the first one's projection of the error, which is the same matrix, so that channels without
         input need no care and the weight itself comes nearer too.
Needs    gram [in, in] float32.     Cost  O(out * in^2 + min(out, in)^3) time; rank * (out + in) numbers stored.
Update   w_hat += a a' e,  e = w - w_hat,  a = the leading eigenvectors of  e gram e'
Fails    CalibrationError when no token reached the layer, NumericsError when the weight is not finite or a factor is beyond the range
         of its type.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.factors import check_factors, factor_bytes, leading_part
from bitpress.formats import CompressedWeight, Format, LowRank

__all__ = ["QERA"]


@dataclass(frozen=True)
class QERA:
    """`dtype` of the factors: fp16, bf16 or a number format such as int8-row."""

    rank: int = 32
    dtype: str = "fp16"

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    summary: ClassVar[str] = "the low-rank term for the rounding error that is best for the layer's output"
    paper: ClassVar[str] = "yardstick: QERA"

    def __post_init__(self) -> None:
        check_factors(self.rank, self.dtype)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> None:
        return None

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> LowRank:
        error = w - weight.dequantize()
        if stats is None:
            a, _ = leading_part(error, self.rank)
        else:
            a, _ = leading_part(_felt(error, stats.need_gram("qera")), self.rank)
        return LowRank.store(a, a.T @ error, self.dtype)


def _felt(error: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"]) -> Float[torch.Tensor, "out some"]:
    """Return a matrix F with F F' = error gram error', up to a factor: its leading part has the columns sought.

    F is the symmetric root of that product, or the error times a root of the gram, whichever is the smaller to decompose.
    """
    size = float(error.abs().max())
    wide = error.double() / (size if size > 0 else 1.0)
    even = gram.double() / gram.diagonal().double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    small = error.shape[0] <= error.shape[1]
    values, vectors = torch.linalg.eigh(wide @ even @ wide.T if small else even)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt()
    return (root if small else wide @ root).float()
