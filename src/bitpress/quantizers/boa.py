"""BoA: GPTQ with attention-aware Hessians: errors are fed back across the rows of a head as well as across columns.

Source   Kim et al. 2024, "Attention-aware Post-training Quantization without Backpropagation" (BoA). Only a part of
         its text was seen; the order of rows inside columns follows public code of its successor (TurboBoA).
Differs  parameters are static and fitted before; queries and keys include their rotary positions; row and column statistics multiply, as
         in the paper's relaxation. rows=1 is the paper's way; with more, so many rows of each head are rounded together, which is faster
         and less exact: TurboBoA's speed-up without its corrections.
Needs    gram [in, in]; row_gram [heads, row, row]; for values head_gram [heads, in, in]; float32.
Cost     as GPTQ, but that query, key and value weights are read row / rows times, some of their rows at a time.
Update   w[h, r2:] -= V[r1:r2, r2:]' V[r1:r2, r1:r2]'^-1 (w[h, r1:r2] - q[h, r1:r2]),  V = upper Cholesky factor of inv(row_gram),
         after columns as in GPTQ with U of the gram, or of the head's own
Fails    as GPTQ; if a row_gram cannot be factored, its head has no feedback across rows: a named fallback. Weights without a role in the
         attention of their own (fused projections, experts, feed-forward layers) are rounded by GPTQ.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.quantizers.mechanisms.error_feedback import Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.row_feedback import round_by_rows, round_chosen
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["BoA", "attention_error"]


@dataclass(frozen=True)
class BoA(Quantizer):
    rows: int = 1
    damp: float = 0.01
    order: Order = "activation"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "row_gram", "head_gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "error feedback across columns and across the rows of attention heads"
    paper: ClassVar[str] = "P155"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("*", "!tcq*")  # rows one after another, where a path runs through all of them

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if self.rows < 1:
            raise UsageError(f"rows={self.rows}: must be 1 or more.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("boa", self.serves, fmt)
        stats = stats or Stats(0)
        gram = stats.need_gram("boa")
        w = w.float()
        by_row = stats.row_gram
        grams = gram[None] if stats.head_gram is None or by_row is None else stats.head_gram
        feedbacks = [prepare(g, self.order, fmt.grid.span, self.damp, self.damp_limit) for g in grams]
        fallbacks = list(dict.fromkeys(text for feedback in feedbacks for text in feedback.fallbacks))
        importance = torch.stack([feedback.importance for feedback in feedbacks]).repeat_interleave(w.shape[0] // len(grams), 0)
        params = fmt.fit(w, importance, shrink_ratios(self.clip, self.steps, self.smallest))
        if by_row is None:
            codes, _ = round_chosen(w, fmt, params, feedbacks, torch.arange(w.shape[0], device=w.device)[None], self.lazy)
            return Outcome(CompressedWeight((Packed.pack(fmt, codes, params),)), tuple(fallbacks), {"heads": 0.0})
        heads, row = by_row.shape[0], by_row.shape[1]
        if heads * row != w.shape[0] or heads % len(grams):
            raise CalibrationError(
                f"boa: {heads} heads of {row} rows with {len(grams)} grams do not fit a weight of {w.shape[0]} rows."
            )
        across = [prepare(g, "natural", 1, self.damp, self.damp_limit).factor for g in by_row]
        if any(factor is None for factor in across):
            fallbacks.append(
                f"a head's row gram could not be factored at damping {self.damp_limit}; no feedback across its rows"
            )
        factors = torch.stack([torch.eye(row, device=w.device) if factor is None else factor for factor in across])
        codes = round_by_rows(w, fmt, params, feedbacks, factors, torch.arange(row, device=w.device), self.rows, self.lazy)
        return Outcome(CompressedWeight((Packed.pack(fmt, codes, params),)), tuple(fallbacks), {"heads": float(heads)})


def attention_error(w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"], stats: Stats) -> float:
    """Return the relative squared error of a weight as the attention propagates it: sum over heads of tr(R D G D') / tr(R w G w')."""
    by_row = torch.ones(w.shape[0], 1, 1, device=w.device) if stats.row_gram is None else stats.row_gram
    grams = stats.need_gram("attention")[None] if stats.head_gram is None else stats.head_gram
    grams = grams.repeat_interleave(by_row.shape[0] // len(grams), 0) if len(grams) > 1 else grams

    def energy(part: torch.Tensor) -> float:
        split = part.unflatten(0, (by_row.shape[0], -1))
        return float(((by_row @ split @ grams) * split).sum())

    whole = energy(w)
    return energy(w - w_hat) / whole if whole > 0 else 0.0
