"""SqueezeLLM: a table of levels per row by k-means, weighted by the sensitivity of the loss; few weights stored apart.

Source   Kim et al. 2023, "SqueezeLLM: Dense-and-Sparse Quantization"; the order of steps as in the authors' public code
         (`outliers.py`, `nuq.py`): the most sensitive weights, then the largest ones are taken out, then levels are learned.
Differs  exactly the share `outliers` of the weights is stored apart as the largest, where the code uses a multiple of the quartiles'
         distance per layer up to a share of the model; k-means starts from good cuts (`formats.grids.kmeans`); the remainder of an
         outlier's code is stored; importance="gram" takes the squares of the inputs instead of the squared gradients.
Needs    sensitivity [out, in], the mean squared gradient of the loss; or the diagonal of gram [in, in].
Cost     O(out * in * log(in)) time; 4 bytes a weight kept apart.
Update   levels = argmin sum_j sensitivity_j (w_j - nearest level)^2, weights kept apart left out
Fails    CalibrationError without the statistic; a row without any sensitivity is clustered with equal weights.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.quantizers.mechanisms.outliers import with_outliers
from bitpress.quantizers.mechanisms.storage import sparse_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["SqueezeLLM"]


@dataclass(frozen=True)
class SqueezeLLM(Quantizer):
    sensitive: float = 0.0005
    outliers: float = 0.0045
    importance: Literal["gradient", "gram"] = "gradient"

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "sensitivity"})
    transforms: ClassVar[tuple[str, ...]] = ()
    serves: ClassVar[tuple[str, ...]] = ("kmeans*",)
    summary: ClassVar[str] = "tables of levels by k-means weighted by squared gradients; few weights kept apart"
    paper: ClassVar[str] = "P376"
    bits: ClassVar[tuple[float, float]] = (3, 4)

    def __post_init__(self) -> None:
        if self.importance not in ("gradient", "gram"):
            raise UsageError(f"importance={self.importance!r}: must be 'gradient' or 'gram'.")
        if not (0 <= self.sensitive < 1 and 0 <= self.outliers < 1):
            raise UsageError(f"sensitive and outliers must be 0 or more and below 1, got {self.sensitive}, {self.outliers}.")
        if self.importance == "gram":
            # Gradients need a backward pass through the whole model, so they are measured only if used.
            object.__setattr__(self, "needs", frozenset({"gram"}))

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        count = int(self.sensitive * math.prod(shape)) + int(self.outliers * math.prod(shape))
        return fmt.nbytes((shape[0] * parts, shape[1])) + (sparse_bytes(count, shape, parts) if count else 0)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("squeezellm", self.serves, fmt)
        w = w.float()
        sensitivity = self._sensitivity(w, stats or Stats(0))
        apart = largest(sensitivity, self.sensitive)
        apart |= largest(torch.where(apart, 0.0, w.abs()), self.outliers)
        params = fmt.fit(w, sensitivity.masked_fill(apart, 0.0))
        return Outcome(with_outliers(w, apart, fmt, params), figures={"outliers": float(apart.float().mean())})

    def _sensitivity(self, w: torch.Tensor, stats: Stats) -> Float[torch.Tensor, "out in"]:
        if self.importance == "gradient":
            return stats.need("sensitivity", "squeezellm")
        return stats.need_gram("squeezellm").diagonal().clamp(min=0.0).expand(w.shape)


def largest(values: Float[torch.Tensor, "out in"], share: float) -> torch.Tensor:
    """Return a mask of the largest `share` of values; zeros are never selected."""
    flat = values.reshape(-1)
    marked = torch.zeros_like(flat, dtype=torch.bool)
    marked[flat.topk(int(share * flat.numel())).indices] = True
    return (marked & (flat > 0)).view(values.shape)
