"""Salient weights: those that the layer's output depends on most, kept apart in half precision.

Source   Kim et al. 2023, "SqueezeLLM: Dense-and-Sparse Quantization": the sensitive values of its sparse part.
Differs  sensitivity is w^2 times the mean square of its input (the energy of the output through this weight), where the paper has
         the diagonal of the loss's Fisher information; a share of all weights of a matrix; any quantizer for the rest, with zeros in
         their places.
Needs    gram [in, in] float32.     Cost  O(out * in) time; 32 bits a weight kept and 32 a row stored (`formats.terms.sparse`).
Update   w_hat = sparse + Q(w - sparse),  sparse = the `share` of weights of largest w^2 gram[j, j]
Fails    CalibrationError when no token reached the layer; NumericsError when a weight is not finite or is beyond the range of fp16.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.outliers import check_share, keep_largest, sparse_bytes
from bitpress.formats import CompressedWeight, Format, Sparse

__all__ = ["Salient"]


@dataclass(frozen=True)
class Salient:
    share: float = 0.0005

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    summary: ClassVar[str] = "the weights that the output depends on most kept apart in half precision"
    paper: ClassVar[str] = "P376"

    def __post_init__(self) -> None:
        check_share(self.share)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return sparse_bytes(self.share, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Sparse:
        score = w.abs()
        if stats is not None:
            # |w| times the root mean square orders weights as the square does, and overflows for no finite gram.
            score = score * stats.need_gram("salient").diagonal().clamp(min=0).sqrt()
        return keep_largest(w, score, self.share)

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> None:
        return None
