"""Outliers: the weights of largest magnitude kept apart in half precision, so that the range of their blocks need not include them.

Source   Kim et al. 2023, "SqueezeLLM: Dense-and-Sparse Quantization": the outliers of its sparse part.
Differs  a share of all weights of a matrix; any quantizer for the rest, with zeros in their places.
Needs    nothing.                   Cost  O(out * in) time; 32 bits an outlier and 32 a row stored (`formats.terms.sparse`).
Update   w_hat = sparse + Q(w - sparse),  sparse = the `share` of weights of largest |w|
Fails    NumericsError when a weight is not finite or an outlier is beyond the range of fp16.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import NumericsError, UsageError
from bitpress.formats import CompressedWeight, Format, Sparse
from bitpress.formats.terms.sparse import sparse

__all__ = ["Outliers", "check_share", "keep_largest", "sparse_bytes"]


@dataclass(frozen=True)
class Outliers:
    share: float = 0.0045

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "the weights of largest magnitude kept apart in half precision"
    paper: ClassVar[str] = "P376"

    def __post_init__(self) -> None:
        check_share(self.share)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return sparse_bytes(self.share, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Sparse:
        return keep_largest(w, w.abs(), self.share)

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> None:
        return None


def check_share(share: float) -> None:
    """Raise UsageError for a share outside of (0, 1)."""
    if not 0 < share < 1:
        raise UsageError(f"share={share}: must be above 0 and below 1, for example 0.005.")


def keep_largest(w: Float[torch.Tensor, "out in"], score: Float[torch.Tensor, "out in"], share: float) -> Sparse:
    """Keep the share of the weights with the largest scores. Raises NumericsError when a score is not finite."""
    if not bool(torch.isfinite(score).all()):
        raise NumericsError("a weight, or its score, is a NaN or an infinity.")
    mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    mask[score.flatten().topk(_count(share, w.shape[0], w.shape[1]), sorted=False).indices] = True
    return sparse(w, mask.reshape(w.shape))


def sparse_bytes(share: float, shape: tuple[int, int], parts: int) -> int:
    """Return the bytes of the sparse terms of `parts` weights, stacked."""
    count = _count(share, *shape) * parts
    tensors = Sparse.expected({"count": count}, (shape[0] * parts, shape[1]))
    return sum(kind.itemsize * math.prod(dims) for kind, dims in tensors.values())


def _count(share: float, out: int, inner: int) -> int:
    return round(share * out * inner)
