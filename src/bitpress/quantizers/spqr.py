"""SpQR: GPTQ with small groups, and the weights that are costliest to round stored apart in half precision.

Source   Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression"; the measure of
         outliers, the leave-one-out fit and the threshold as in the authors' public code (`spqr_engine.py`).
Differs  groups are fitted before the first column is rounded; only the two ends of a group are left out in turn, since no other weight
         changes its range; the clipping search is GPTQ's, with that cost; codes of outliers stay the nearest ones, and their remainder
         is stored; at most about `most` of the weights are outliers, whatever the threshold; the quantized scales are the format's
         (int3-g16-zero-s4), zeros are integer codes.
Needs    gram [in, in] float32.     Cost  as GPTQ, and four fits; 4 bytes an outlier.
Update   cost(r, j) = (w - Q(w))^2 / U[j, j]^2;  outlier where cost > threshold * mean_j(var(w[:, j]) / U[j, j]^2);  the errors
         of outliers are not fed back
Fails    as GPTQ.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.formats.terms.sparse import sparse
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.outliers import in_blocks, without
from bitpress.quantizers.mechanisms.storage import sparse_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["SpQR"]


@dataclass(frozen=True)
class SpQR(Quantizer):
    threshold: float = 0.2
    most: float = 0.005
    damp: float = 0.01
    order: Order = "activation"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 64
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "error feedback with the costliest weights kept apart in half precision"
    paper: ClassVar[str] = "P450"
    bits: ClassVar[tuple[float, float]] = (2, 4)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if not self.threshold > 0 or not 0 <= self.most < 1:
            raise UsageError(f"threshold must be above 0 and 0 <= most < 1, got {self.threshold}, {self.most}.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        return fmt.nbytes((shape[0] * parts, shape[1])) + sparse_bytes(round(self.most * math.prod(shape)), shape, parts)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("spqr")
        w = w.float()
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        cost = feedback.cost()
        ratios = shrink_ratios("mse", self.steps, self.smallest)
        usefulness = leave_one_out(w, cost, fmt)
        limit = self.limit(usefulness, w, cost)
        likely = usefulness > limit
        params = fmt.fit(without(w, likely, fmt), cost * ~likely, ratios)
        least = (limit / cost).sqrt_()[:, None].repeat(1, w.shape[0])
        columns = Columns(fmt, w, cost, ratios, static=True, params=params, least=least)
        columns.round_(feedback.order, feedback.factor, self.lazy)
        assert columns.kept is not None
        outliers = sparse(columns.kept.T, columns.kept.T != 0)
        weight = CompressedWeight((Packed.pack(fmt, columns.codes, columns.params), outliers))
        figures = {"damp": feedback.damp or 0.0, "outliers": outliers.count / w.numel()}
        return Outcome(weight, feedback.fallbacks, figures)

    def limit(self, usefulness: torch.Tensor, w: torch.Tensor, cost: torch.Tensor) -> float:
        """Return the cost above which a weight is an outlier."""
        usual = self.threshold * float((w.var(0, correction=0) * cost).mean())
        count = int(self.most * w.numel())
        return max(usual, float(usefulness.flatten().topk(count + 1).values[-1]))


def leave_one_out(
    w: Float[torch.Tensor, "out in"], cost: Float[torch.Tensor, " in"], fmt: Format
) -> Float[torch.Tensor, "out in"]:
    """Return by how much the cost of a block falls when one weight is stored apart.

    For most weights that is the weight's own cost; without the smallest or the largest weight, the range shrinks too.
    """
    params = fmt.fit(w)
    own = _costs(w, cost, fmt, params)
    whole = in_blocks(own, fmt).sum((1, 3), keepdim=True)
    useful = own
    for end in (torch.amin, torch.amax):
        tiles = in_blocks(w, fmt)
        at_end = _first(tiles == end(tiles, (1, 3), keepdim=True)).reshape(w.shape)
        filled = without(w, at_end, fmt)
        rest = _costs(filled, cost, fmt, fmt.fit(filled, shared=params)).masked_fill_(at_end, 0.0)
        gain = (whole - in_blocks(rest, fmt).sum((1, 3), keepdim=True)).expand(tiles.shape).reshape(w.shape)
        useful = torch.where(at_end, torch.maximum(gain, own), useful)
    return useful


def _first(mask: Bool[torch.Tensor, "down rows across cols"]) -> Bool[torch.Tensor, "down rows across cols"]:
    """Keep only the first of equal entries of every block."""
    down, rows, across, cols = mask.shape
    flat = mask.transpose(1, 2).reshape(down * across, rows * cols)
    first = torch.zeros_like(flat).scatter_(1, flat.float().argmax(1, keepdim=True), True)
    return first.view(down, across, rows, cols).transpose(1, 2)


def _costs(w: torch.Tensor, cost: torch.Tensor, fmt: Format, params: Params) -> Float[torch.Tensor, "out in"]:
    return fmt.decode(fmt.encode(w, params), params).sub_(w).square_().mul_(cost)
