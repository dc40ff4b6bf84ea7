"""COMQ: minimise the output's error over one code or one scale at a time, the costliest weights first.

Source   Zhang et al. 2024, "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization"; the start from the weights
         themselves and the greedy order as in the authors' public code (`quant.py`), where scales stay as they were fitted.
Differs  one order for all rows, by the average cost of a column's weights (on a block of SmolLM2 an order per row took 8 times as
         long for the same error within 1%); sweeps are those of `Descent`; scales are updated block by block after each sweep, to
         the minimum along that coordinate, if the stored scale reduces the error; zero points stay as fitted by a clipping search
         weighted by the gram's diagonal; `damp` times the mean diagonal is part of the error. Any grid whose levels are times a
         scale works. Only the abstract of the text was seen. start="gptq" is not in the paper.
Needs    gram [in, in] float32.     Cost  O(sweeps * out * in^2 + in^3) time, O(in^2) memory.
Update   w_hat[:, j] = Q(w_hat[:, j] + (w - w_hat) gram[:, j] / gram[j, j]), j by sum of |w[:, j]| * sqrt(gram[j, j]), then
         scale += (w - w_hat) gram q' / (q gram q'),  q the levels of a block before scaling, 0 elsewhere
Fails    CalibrationError when no token reached the layer. If the end is worse than the start, the start is kept: a fallback.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.quantizers.mechanisms.coordinate_descent import LAZY, Descent, prepare_descent
from bitpress.quantizers.mechanisms.error_feedback import Columns, prepare
from bitpress.quantizers.mechanisms.scales import stored_scales
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["COMQ", "fit_scales", "greedy_order"]

DAMP_LIMIT = 10.0


@dataclass(frozen=True)
class COMQ(Quantizer):
    sweeps: int = 5
    start: Literal["weight", "gptq"] = "weight"
    damp: float = 0.01
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "coordinate descent over codes and scales, the costliest weights first"
    paper: ClassVar[str] = "P265"
    bits: ClassVar[tuple[float, float]] = (2, 4)

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        if self.start not in ("weight", "gptq"):
            raise UsageError(f"start={self.start!r}: must be 'weight' or 'gptq'.")
        if self.sweeps < 1 or not 0 < self.damp <= DAMP_LIMIT:
            raise UsageError(f"sweeps must be 1 or more and 0 < damp <= {DAMP_LIMIT:g}, got {self.sweeps}, {self.damp}.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("comq")
        w = w.float()
        descent = prepare_descent(gram, greedy_order(w, gram, fmt.grid.span), fmt.grid.span, self.damp)
        fallbacks: tuple[str, ...] = ()
        params = fmt.fit(w, descent.gram.diagonal(), shrink_ratios(self.clip, self.steps, self.smallest))
        if self.start == "gptq":
            feedback = prepare(gram, "activation", fmt.grid.span, self.damp, DAMP_LIMIT)
            fallbacks = feedback.fallbacks
            columns = Columns(fmt, w, feedback.importance, (1.0,), static=True, params=params)
            columns.round_(feedback.order, feedback.factor, LAZY)
            first = columns.codes
            w_hat = fmt.decode(first, params)
        else:
            first, w_hat = fmt.encode(w, params), w
        best = (first, params)
        before = float(descent.errors(w - fmt.decode(*best)).sum())
        for _ in range(self.sweeps):
            codes = descent.sweep(w, w_hat, fmt, params)
            params = fit_scales(w, codes, descent, fmt, params)
            w_hat = fmt.decode(codes, params)
        after = float(descent.errors(w - w_hat).sum())
        if after <= before:
            best = (codes, params)
        else:
            fallbacks += ("sweeps made the error larger; the codes they started from are kept",)
        figures = {"gain": 1 - after / before if before > 0 else 0.0}
        return Outcome(CompressedWeight((Packed.pack(fmt, *best),)), fallbacks, figures)


def greedy_order(w: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"], span: int) -> Int[torch.Tensor, " in"]:
    """Return the columns by the size of their contribution to the output, the largest first; the `span` columns of a code stay together."""
    cost = (w.abs().mean(0) * gram.diagonal().clamp(min=0).sqrt()).view(-1, span).sum(-1)
    return (torch.argsort(cost, descending=True, stable=True)[:, None] * span + torch.arange(span, device=w.device)).reshape(-1)


def fit_scales(
    w: Float[torch.Tensor, "out in"],
    codes: Int[torch.Tensor, "codes_down codes_across"],
    descent: Descent,
    fmt: Format,
    params: Params,
) -> Params:
    """Return the parameters with the best scale of every block for the codes, one column of blocks after another.

    Only for formats with single scales; a scale changes only if its stored value reduces the error.
    """
    if [p.shape for p in fmt.grid.params if p.kind == "scale"] != [()]:
        return params
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    scale = params["scale"].clone()
    levels = fmt.decode(codes, {**params, "scale": torch.ones_like(scale)})
    pull = (w - fmt.decode(codes, params)) @ descent.gram
    for block in range(w.shape[1] // cols):
        here = slice(block * cols, (block + 1) * cols)
        moved = levels[:, here] @ descent.gram[here]  # [out, in]
        slope = (pull[:, here] * levels[:, here]).view(-1, rows * cols).sum(1)
        curve = (moved[:, here] * levels[:, here]).reshape(-1, rows * cols).sum(1)
        proposed = scale.clone()
        proposed[:, block] += slope / curve
        step = (stored_scales(fmt, {**params, "scale": scale}, proposed) - scale)[:, block]
        step = torch.where(step * (step * curve - 2 * slope) < 0, step, 0.0)
        scale[:, block] += step
        pull.addcmul_(moved, step.repeat_interleave(rows)[:, None], value=-1)
    return {**params, "scale": scale}
