"""GPTQ: round columns in order, push each rounding error onto the columns not yet rounded.

Source   Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; activation
         order and static groups as in the authors' public code.
Differs  columns in lazily updated batches, rows in parallel; a grid of span k rounds k columns at a time; the clipping search of
         a group's parameters is weighted by the diagonal of the gram. groups="running" is `mechanisms.running_groups`.
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
from bitpress.formats import Format, Packed
from bitpress.quantizers.mechanisms.error_feedback import Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.running_groups import Groups, arrange, check_groups, moves_columns
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(Quantizer):
    damp: float = 0.01
    order: Order = "activation"
    groups: Groups = "static"
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
    native_loops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        check_groups(self.groups)

    @property
    def keeps_map(self) -> bool:
        return moves_columns(self.groups, self.order)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("gptq")
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        arranged = arrange(w.float(), gram, feedback, fmt, self.groups, self.order)
        columns = arranged.columns(fmt, shrink_ratios(self.clip, self.steps, self.smallest), lazy=self.lazy)
        weight = arranged.restored(Packed.pack(fmt, columns.codes, columns.params))
        return Outcome(weight, feedback.fallbacks, {"damp": feedback.damp or 0.0})
