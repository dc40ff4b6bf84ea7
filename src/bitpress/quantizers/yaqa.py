"""YAQA: adaptive rounding under the curvature of the model's loss, with feedback from earlier columns and from earlier rows.

Source   Tseng et al. 2025, "Model-Preserving Adaptive Rounding" (arXiv 2505.22988): the abstract, the authors' account
         (together.ai/blog/yaqa), and their public code (`lib/algo/ldlq.py`, `hessian_llama/custom_linear_A.py`).
Differs  tokens count as independent (sketch A of the code, which recommends sketch B: whole texts), and each factor is measured once, with
         the identity in the other's place: the gram, which counts tokens by the loss under calibration.gram=loss, and the output_gram. The
         code goes from one to the other six times. Errors go from row to row and within a row from column to column, which is its rounding
         with tiles of `rows` rows and one code. Rows and columns with the most curvature come first, in the code the last ones. Scales are
         those of the format, with a clipping search, where the code has one for the weight.
Needs    gram [in, in], output_gram [out, out], float32.
Cost     as GPTQ, but that the weight is read out / rows times.
Update   q_ij = Q(w_ij + ((I + M)' E (I + L) - E)_ij),   E = w - w_hat of codes rounded before, else 0
         gram = (I + L) D (I + L)',   output_gram = (I + M) F (I + M)',   L, M strictly triangular in the order of rounding
Fails    as LDLQ. Without an output_gram (experts) or if it cannot be factored, the weight is rounded by columns alone: a named fallback.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.quantizers.mechanisms.error_feedback import Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.row_feedback import round_by_rows
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["YAQA", "curvature_error"]


@dataclass(frozen=True)
class YAQA(Quantizer):
    """`rows` are rounded together, as many as in a tile of the code: 1 is exact, more are faster. Damping is the same on both sides."""

    rows: int = 16
    order: Order = "activation"
    damp: float = 0.01
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "output_gram"})
    transforms: ClassVar[tuple[dict[str, Any], ...]] = ({"name": "hadamard", "outputs": True},)
    summary: ClassVar[str] = "error feedback across columns and rows, by the curvature of the model's loss"
    paper: ClassVar[str] = "yardstick: YAQA"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("*", "!tcq*")  # rows one after another, where a path runs through all of them

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if self.rows < 1:
            raise UsageError(f"rows={self.rows}: must be 1 or more.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("yaqa", self.serves, fmt)
        stats = stats or Stats(0)
        gram, by_output = stats.need_gram("yaqa"), stats.output_gram
        if by_output is not None and by_output.shape[0] != w.shape[0]:
            raise CalibrationError(f"yaqa: an output_gram of {by_output.shape[0]} rows for a weight of {w.shape[0]}.")
        w = w.float()
        columns = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        fallbacks = list(columns.fallbacks)
        params = fmt.fit(w, columns.importance, shrink_ratios(self.clip, self.steps, self.smallest))
        factor, order = torch.eye(w.shape[0], device=w.device), torch.arange(w.shape[0], device=w.device)
        rows, measured = w.shape[0], None
        if by_output is None:
            fallbacks.append("the loss does not tell how its outputs matter; rounded without feedback across rows")
        else:
            across = prepare(by_output, self.order, 1, self.damp, self.damp_limit)
            if across.factor is None:
                fallbacks.append(f"the output_gram could not be factored at damping {self.damp_limit}; no feedback across rows")
            else:
                factor, order, rows = across.factor, across.order, self.rows
                measured = _damped(by_output, across.damp)
        codes = round_by_rows(w, fmt, params, [columns], factor[None], order, rows, self.lazy)
        plain = fmt.encode(w, params)
        damped = _damped(gram, columns.damp)
        before, after = (_energy(w - fmt.decode(c, params), damped, measured) for c in (plain, codes))
        if before < after:  # below two bits feedback may diverge
            codes = plain
            fallbacks.append("feedback made the error larger; rounded without it")
        return Outcome(CompressedWeight((Packed.pack(fmt, codes, params),)), tuple(fallbacks), {"damp": columns.damp or 0.0})


def curvature_error(w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"], stats: Stats) -> float:
    """Return tr(H_O D H_I D') / tr(H_O w H_I w'), D = w - w_hat, H_I the gram and H_O the output_gram."""
    gram, by_output = stats.need_gram("yaqa"), stats.need("output_gram", "yaqa")
    whole = _energy(w, gram, by_output)
    return _energy(w - w_hat, gram, by_output) / whole if whole > 0 else 0.0


def _damped(gram: Float[torch.Tensor, "n n"], damp: float | None) -> Float[torch.Tensor, "n n"]:
    return gram + (damp or 0.0) * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)


def _energy(
    d: Float[torch.Tensor, "out in"], gram: Float[torch.Tensor, "in in"], by_output: Float[torch.Tensor, "out out"] | None
) -> float:
    rows = d if by_output is None else by_output @ d
    return float((rows @ gram).mul_(d).sum())
