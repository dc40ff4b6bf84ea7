"""LQER: a low-rank term for the rounding error, fitted where the layer's inputs are large.

Source   Zhang et al. 2024, "LQER: Low-Rank Quantization Error Reconstruction for LLMs"; the scaled form (L2QER) as in the authors'
         public code (`lqer_act.py`, `scale.py`). Their plain LQER is LoRC's term.
Differs  mean magnitudes are means over all tokens, not the largest mean of a batch; they are bounded by 1e-4 of the largest one, not by
         1e-4; after a change of basis, or with scale="rms", root mean squares stand for them.
Needs    gram [in, in], mean_abs [in] float32.      Cost  O(out * in * min(out, in)) time; rank * (out + in) numbers stored.
Update   w_hat += a b / s,  a b = argmin over matrices of the rank of |(w - w_hat) s - a b|^2,  s = mean_abs by input channel
Fails    CalibrationError when no token reached the layer, NumericsError when the weight is not finite or a factor is beyond the range
         of its type.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.factors import check_factors, factor_bytes, leading_part
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, LowRank

__all__ = ["LQER", "input_scale"]

# A channel that is almost never used would otherwise get a factor near 1 / 0.
SMALLEST = 1e-4


@dataclass(frozen=True)
class LQER:
    """`dtype` of the factors: fp16, bf16 or a number format such as int8-row."""

    rank: int = 32
    dtype: str = "fp16"
    scale: Literal["mean_abs", "rms"] = "mean_abs"

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean_abs"})
    summary: ClassVar[str] = "a low-rank term for the rounding error, scaled by the inputs' magnitudes"
    paper: ClassVar[str] = "P239"

    def __post_init__(self) -> None:
        check_factors(self.rank, self.dtype)
        if self.scale not in ("mean_abs", "rms"):
            raise UsageError(f"scale={self.scale!r}: must be 'mean_abs' or 'rms'.")

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> None:
        return None

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> LowRank:
        scale = torch.ones(w.shape[1], device=w.device) if stats is None else input_scale(stats, self.scale)
        a, b = leading_part((w - weight.dequantize()) * scale, self.rank)
        return LowRank.store(a, b / scale, self.dtype)


def input_scale(stats: Stats, kind: str) -> Float[torch.Tensor, " in"]:
    """Return the magnitude of every input channel relative to the largest one, at least 1e-4."""
    gram = stats.need_gram("lqer")
    magnitude = gram.diagonal().clamp(min=0).sqrt() if kind == "rms" or stats.mean_abs is None else stats.mean_abs.float()
    largest = magnitude.max()
    return (magnitude / largest).clamp(min=SMALLEST) if largest > 0 else torch.ones_like(magnitude)
