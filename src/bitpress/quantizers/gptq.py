"""GPTQ: round columns in order, push each rounding error onto the columns not yet rounded.

Source   Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; activation
         order and static groups as in the authors' public code.
Differs  columns in lazily updated batches, rows in parallel; a grid of span k rounds k columns at a time; the clipping search of
         a group's parameters is weighted by the diagonal of the gram; order="activation" with groups="running"
         forms groups in the permuted order and keeps the permutation as the weight's input map.
Needs    gram [in, in] float32.     Cost  O(out * in^2 + in^3) time, O(in^2) memory.
Update   w[:, j+1:] -= (w[:, j] - q_j) / U[j, j] * U[j, j+1:],  U = upper Cholesky factor of inv(gram + damp * mean_diag * I)
Fails    if the gram cannot be factored, damping rises tenfold up to `damp_limit`; after that, rounding goes without feedback: a
         named fallback. Weights of input channels that were always 0 are rounded to nearest.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Permutation
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(Quantizer):
    damp: float = 0.01
    order: Order = "activation"
    groups: Literal["static", "running"] = "static"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "error feedback by second-order statistics of the layer's input"
    paper: ClassVar[str] = "P140"
    bits: ClassVar[tuple[float, float]] = (2, 4)

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if self.groups not in ("static", "running"):
            raise UsageError(f"groups={self.groups!r}: must be 'static' or 'running'.")

    @property
    def keeps_map(self) -> bool:
        return self.groups == "running" and self.order == "activation"

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("gptq")
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        order, importance = feedback.order, feedback.importance
        ratios = shrink_ratios(self.clip, self.steps, self.smallest)
        w = w.float()
        if self.keeps_map:
            w, importance = w[:, order], importance[order]
            walk = torch.arange(w.shape[1])
        else:
            walk = order
        columns = Columns(fmt, w, importance, ratios, static=self.groups == "static" or fmt.block.cols == "all")
        columns.round_(walk, feedback.factor, self.lazy)
        weight = CompressedWeight((Packed.pack(fmt, columns.codes, columns.params),))
        if self.keeps_map:
            weight = CompressedWeight(weight.terms, input_map=Permutation(order.to(torch.int32)))
        return Outcome(weight, feedback.fallbacks, {"damp": feedback.damp or 0.0})
