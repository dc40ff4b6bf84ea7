"""EasyQuant: without data; keep the outlying weights as they are, and choose each range for the least error of the rest.

Source   Tang et al. 2024, "EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs", known here from the
         abstract and summaries: under 1% of the weights are outliers beyond some standard deviations, ranges are optimised by gradient.
Differs  an outlier lies `sigmas` standard deviations from the mean of its own row; `steps` ranges are tried,
         where the paper follows the gradient of the range, so no local minimum stops it; the remainder of an outlier is stored.
Needs    nothing.                   Cost  O(out * in * steps) time; 4 bytes an outlier.
Update   outlier where |w - mean| > sigmas * std;  range = argmin over steps of sum over the others (w - Q(w; range))^2
Fails    NumericsError when a weight is not finite.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.quantizers.mechanisms.outliers import with_outliers, without
from bitpress.quantizers.mechanisms.storage import sparse_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["EasyQuant"]


@dataclass(frozen=True)
class EasyQuant(Quantizer):
    sigmas: float = 4.0
    steps: int = 40
    smallest: float = 0.3

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "data-free: far weights kept apart, ranges of the rest by squared error"
    paper: ClassVar[str] = "P298"
    bits: ClassVar[tuple[float, float]] = (3, 4)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        if not self.sigmas > 0:
            raise UsageError(f"sigmas={self.sigmas}: must be above 0.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        count = round(
            math.erfc(self.sigmas / math.sqrt(2)) * math.prod(shape)
        )  # what a normal distribution has beyond the limit
        return fmt.nbytes((shape[0] * parts, shape[1])) + (sparse_bytes(count, shape, parts) if count else 0)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        w = w.float()
        std, mean = torch.std_mean(w, 1, correction=0, keepdim=True)
        outliers = (w - mean).abs() > self.sigmas * std
        ratios = shrink_ratios("mse", self.steps, self.smallest)
        # Weights of no importance do not count in a fit, and their replacements do not widen it.
        params = fmt.fit(without(w, outliers, fmt), (~outliers).float(), ratios)
        return Outcome(with_outliers(w, outliers, fmt, params), figures={"outliers": float(outliers.float().mean())})
