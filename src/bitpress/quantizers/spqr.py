"""SpQR: GPTQ with small groups, and the weights that are costliest to round stored apart in half precision.

Source   Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression"; the measure of
         outliers, the leave-one-out fit and the threshold as in the authors' public code (`spqr_engine.py`).
Differs  only the two ends of a group are left out in turn, since no other weight changes its range; the clipping search is GPTQ's, with
         that cost; codes of outliers stay the nearest ones, and their remainder is stored. Scales of groups are those of the format: 4 bits
         under a float32 a row in int3-g16-zero-s4, where the code has 3 bits under a scale and an offset for every 16 rows; zero points are
         integer codes, where the code rounds fractions to 3 bits in the same way. `most` bounds the share of outliers: a limit that lets
         through more of the weights as they begin is raised.
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
from bitpress.formats import Block, Format, Packed, Params
from bitpress.formats.terms.sparse import sparse
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.outliers import in_blocks, without
from bitpress.quantizers.mechanisms.running_groups import Groups, arrange, check_groups, moves_columns
from bitpress.quantizers.mechanisms.storage import sparse_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["SpQR"]


# The share of outliers that plans count on: which share a threshold makes is known only after the fact.
USUAL = 0.01


@dataclass(frozen=True)
class SpQR(Quantizer):
    threshold: float = 0.2
    most: float = 0.05
    damp: float = 0.01
    order: Order = "activation"
    groups: Groups = "running"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 64
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "error feedback with the costliest weights kept apart in half precision"
    paper: ClassVar[str] = "P450"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        check_groups(self.groups)
        if not self.threshold > 0 or not 0 <= self.most < 1:
            raise UsageError(f"threshold must be above 0 and 0 <= most < 1, got {self.threshold}, {self.most}.")

    @property
    def keeps_map(self) -> bool:
        return moves_columns(self.groups, self.order)

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        count = round(min(self.most, USUAL) * math.prod(shape))
        return fmt.nbytes((shape[0] * parts, shape[1])) + sparse_bytes(count, shape, parts)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("spqr")
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        arranged = arrange(w.float(), gram, feedback, fmt, self.groups, self.order)
        w, cost = arranged.w, arranged.feedback.cost()
        ratios = shrink_ratios("mse", self.steps, self.smallest)
        usefulness = leave_one_out(w, cost, fmt)
        limit = self.limit(usefulness, w, cost)
        likely = usefulness > limit
        params = fmt.fit(without(w, likely, fmt), cost * ~likely, ratios)
        least = (limit / cost).sqrt_()[:, None].repeat(1, w.shape[0])
        alone = _one_group(fmt, (w.shape[0], w.shape[1]))

        def fit_to(group: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
            own = cost[column : column + group.shape[1]]
            apart = leave_one_out(group, own, alone) > limit
            return without(group, apart, alone), own * ~apart

        columns = Columns(fmt, w, cost, ratios, static=not arranged.running, params=params, least=least, fit_to=fit_to)
        columns.round_(arranged.feedback.order, feedback.factor, self.lazy)
        assert columns.kept is not None
        outliers = sparse(columns.kept.T, columns.kept.T != 0)
        weight = arranged.restored(Packed.pack(fmt, columns.codes, columns.params), outliers)
        figures = {"damp": feedback.damp or 0.0, "outliers": outliers.count / w.numel()}
        return Outcome(weight, feedback.fallbacks, figures)

    def limit(self, usefulness: torch.Tensor, w: torch.Tensor, cost: torch.Tensor) -> float:
        """Return the cost above which a weight is an outlier."""
        usual = self.threshold * float((w.var(0, correction=0) * cost).mean())
        count = int(self.most * w.numel())
        return max(usual, float(usefulness.flatten().topk(count + 1).values[-1]))


def _one_group(fmt: Format, shape: tuple[int, int]) -> Format:
    """Return the format of a column of groups that stands alone, with scales of its own."""
    return Format(fmt.grid, Block(*fmt.block.resolve(shape, fmt.grid.span)), fmt.grid.usual_scale or fmt.scale)


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
