"""LDLQ: round columns in order, each to its weight plus a linear function of the errors made so far; the rounding of QuIP.

Source   Chee et al. 2023, "QuIP: 2-Bit Quantization of Large Language Models With Guarantees"; greedy passes and their order as in the
         authors' public code (`vector_balance.py`: ldlq, ldlqRG). The incoherent basis is the transform `orthogonal`, done before.
Differs  the update has GPTQ's form, which the paper proves to be equivalent: natural order and nearest rounding give GPTQ's codes
         to the last bit. Columns go from first to last, in the public code from last to first. Scales are those of the format,
         with a clipping search, where QuIP takes 2.4 root mean squares of the whole weight; a row keeps the best of its passes.
         LDLQ-RG is order="activation", passes=10.
Needs    gram [in, in] float32.     Cost  as GPTQ; every greedy pass costs about the same again.
Update   q_k = Q(w_k + (w - w_hat)[:, :k] U[:k, k]),   gram = (U + I) D (U + I)',  U strictly upper triangular
         stochastic:  Q(v) is either neighbouring level, v on average;   pass:  q_k = Q(w_hat_k + (w - w_hat) gram[:, k] / gram[k, k])
Fails    as GPTQ; if feedback makes the error larger, the weight is rounded without it: a named fallback; FormatError for stochastic
         rounding to levels that are not evenly spaced.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import EvenlySpaced, Format, Packed, Params
from bitpress.quantizers.mechanisms.coordinate_descent import better_rows, prepare_descent, take_rows
from bitpress.quantizers.mechanisms.error_feedback import Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.running_groups import Arranged, Groups, arrange, check_groups, moves_columns
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["LDLQ"]


@dataclass(frozen=True)
class LDLQ(Quantizer):
    rounding: Literal["nearest", "stochastic"] = "nearest"
    passes: int = 0
    order: Order = "natural"
    groups: Groups = "static"
    damp: float = 0.01
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    seed: int = 0
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ("orthogonal",)
    summary: ClassVar[str] = "adaptive rounding with linear feedback, nearest or stochastic; greedy passes after it"
    paper: ClassVar[str] = "P210"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        check_groups(self.groups)
        if self.rounding not in ("nearest", "stochastic"):
            raise UsageError(f"rounding={self.rounding!r}: must be 'nearest' or 'stochastic'.")
        if self.passes < 0 or (self.passes and self.rounding == "stochastic"):
            raise UsageError(
                f"passes={self.passes}: must be 0 or more, and 0 with stochastic rounding, which greedy passes would undo."
            )
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed={self.seed}: must be an integer from 0 to 2^32 - 1.")

    @property
    def keeps_map(self) -> bool:
        return moves_columns(self.groups, self.order)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        if self.rounding == "stochastic" and not isinstance(fmt.grid, EvenlySpaced):
            raise FormatError(
                f"ldlq: stochastic rounding needs evenly spaced levels, which {fmt.name} lacks; use an int format or rounding=nearest."
            )
        gram = (stats or Stats(0)).need_gram("ldlq")
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        arranged = arrange(w.float(), gram, feedback, fmt, self.groups, self.order)
        dither = _Dither(self.seed) if self.rounding == "stochastic" else None
        ratios = shrink_ratios(self.clip, self.steps, self.smallest)
        columns = arranged.columns(fmt, ratios, dither=dither, lazy=self.lazy)
        codes, params, fallbacks = columns.codes, columns.params, feedback.fallbacks
        figures = {"damp": feedback.damp or 0.0}
        if self.rounding == "nearest":
            plain = fmt.fit(arranged.w, arranged.feedback.importance, ratios) if arranged.running else params
            rounded = fmt.encode(arranged.w, plain)
            before, after = (arranged.w - fmt.decode(*pair) for pair in ((rounded, plain), (codes, params)))
            if _error(before, arranged.gram) < _error(after, arranged.gram):
                # Below two bits feedback may diverge: the weights then lie beyond the outermost level.
                codes, params, fallbacks = rounded, plain, (*fallbacks, "feedback made the error larger; rounded without it")
        if self.passes:
            codes, figures["moved"] = self._greedy(arranged, fmt, params, codes)
        return Outcome(arranged.restored(Packed.pack(fmt, codes, params)), fallbacks, figures)

    def _greedy(self, arranged: Arranged, fmt: Format, params: Params, codes: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Visit the codes again until nothing changes; return the best codes of every row, and the share of codes that moved."""
        w = arranged.w
        descent = prepare_descent(arranged.gram, arranged.feedback.order, fmt.grid.span, self.damp)
        best, current = codes, codes
        w_hat = fmt.decode(codes, params)
        error = descent.errors(w_hat - w)
        for _ in range(self.passes):
            before, current = current, descent.sweep(w, w_hat, fmt, params)
            w_hat = fmt.decode(current, params)
            trial = descent.errors(w_hat - w)
            better = better_rows(fmt, trial, error)
            best = take_rows(fmt, better, current, best)
            error = torch.where(better, trial, error)
            if torch.equal(current, before):
                break
        return best, float((best != codes).float().mean())


def _error(difference: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"]) -> float:
    return float((difference @ gram).mul_(difference).sum())


class _Dither:
    """Noise of one step, after which rounding to nearest is right on average."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, values: Float[torch.Tensor, "out span"], params: Params) -> Float[torch.Tensor, "out span"]:
        noise = torch.rand(values.shape, generator=self.generator).to(values.device)
        return values + (noise - 0.5) * params["scale"]
