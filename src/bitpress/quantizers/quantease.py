"""QuantEase: coordinate descent; set each code to its best level with all others fixed, in many sweeps; optional outliers.

Source   Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models"; relaxed sweeps, the start from GPTQ's
         codes and the order of columns as in the authors' public code (`quantease.py`, `gptq_quantease.py`, `quantease_outlier.py`).
Differs  a sweep is a triangular solve and one pass of error feedback (`Descent`); start="gptq" with 10 sweeps is the default,
         start="weight" is the paper's (30 sweeps in the public code); every third sweep rounds nothing, except the last two; a row
         keeps its start if sweeps made it worse; parameters are fitted once, weighted by the gram's diagonal; `damp` is part of the
         error. Outliers are single weights, not whole columns; their step is 1 / the largest eigenvalue, twice the public code's.
Needs    gram [in, in] float32.     Cost  O(sweeps * out * in^2 + in^3) time, O(in^2) memory; 4 bytes an outlier.
Update   w_hat[:, j] = Q(w_hat[:, j] + (w - w_hat) gram[:, j] / gram[j, j]);
         outliers = the largest of  outliers + (w - w_hat - outliers) gram / eigenvalue
Fails    as GPTQ, whose codes it starts from; sweeps themselves need no factorization.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import Format, Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.quantizers.mechanisms.coordinate_descent import LAZY, better_rows, prepare_descent, take_rows
from bitpress.quantizers.mechanisms.error_feedback import Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.running_groups import Groups, arrange, check_groups, moves_columns
from bitpress.quantizers.mechanisms.storage import sparse_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["QuantEase", "largest_eigenvalue", "moved_outliers"]

POWER_STEPS = 50


@dataclass(frozen=True)
class QuantEase(Quantizer):
    sweeps: int = 10
    start: Literal["gptq", "weight"] = "gptq"
    relax_every: int = 3
    outliers: float = 0.0
    damp: float = 0.01
    order: Order = "activation"
    groups: Groups = "static"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "coordinate descent on the output's error; outliers apart on request"
    paper: ClassVar[str] = "P076"
    bits: ClassVar[tuple[float, float]] = (2, 4)

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, LAZY)
        check_groups(self.groups)
        if self.start not in ("gptq", "weight"):
            raise UsageError(f"start={self.start!r}: must be 'gptq' or 'weight'.")
        if self.sweeps < 1 or self.relax_every < 0 or self.relax_every == 1:
            raise UsageError(
                f"sweeps must be 1 or more and relax_every 0 (never) or 2 or more, got {self.sweeps}, {self.relax_every}."
            )
        if not 0 <= self.outliers <= 0.5:
            raise UsageError(f"outliers={self.outliers}: must be a share of the weights, 0 to 0.5.")

    @property
    def keeps_map(self) -> bool:
        return moves_columns(self.groups, self.order)

    def relaxed(self, sweep: int) -> bool:
        """Return whether a sweep, counted from 0, rounds nothing."""
        return self.relax_every > 0 and sweep % self.relax_every == 1 and sweep < self.sweeps - 2

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        count = round(self.outliers * math.prod(shape))
        return fmt.nbytes((shape[0] * parts, shape[1])) + (sparse_bytes(count, shape, parts) if count else 0)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("quantease")
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        arranged = arrange(w.float(), gram, feedback, fmt, self.groups, self.order)
        w = arranged.w
        descent = prepare_descent(arranged.gram, arranged.feedback.order, fmt.grid.span, self.damp)
        count = round(self.outliers * w.numel())
        apart = _largest(w, count)
        ratios = shrink_ratios(self.clip, self.steps, self.smallest)
        columns = arranged.columns(fmt, ratios, w=w - apart, lazy=LAZY)
        first = codes = columns.codes
        params = columns.params
        first_hat, first_apart = fmt.decode(first, params), apart
        w_hat = first_hat if self.start == "gptq" else w - apart
        step = 1 / largest_eigenvalue(descent.gram) if count else 0.0
        for sweep in range(self.sweeps):
            if self.relaxed(sweep):
                w_hat = descent.relax(w - apart, w_hat)
            else:
                codes = descent.sweep(w - apart, w_hat, fmt, params)
                w_hat = fmt.decode(codes, params)
            if count and sweep < self.sweeps - 1:
                apart = moved_outliers(apart, w - w_hat, descent.gram, step, count)
        better = better_rows(fmt, descent.errors(w - w_hat - apart), descent.errors(w - first_hat - first_apart))
        packed = Packed.pack(fmt, take_rows(fmt, better, codes, first), params)
        figures = {"improved_rows": float(better.float().mean())}
        if not count:
            return Outcome(arranged.restored(packed), feedback.fallbacks, figures)
        apart = torch.where(better[:, None], apart, first_apart)
        weight = arranged.restored(packed, sparse(apart, apart != 0))
        return Outcome(weight, feedback.fallbacks, figures | {"outliers": float((apart != 0).float().mean())})


def moved_outliers(
    apart: Float[torch.Tensor, "out in"], rest: Float[torch.Tensor, "out in"], gram: torch.Tensor, step: float, count: int
) -> Float[torch.Tensor, "out in"]:
    """Move the outliers down the gradient of the remaining error, and keep the largest."""
    return _largest(apart + step * ((rest - apart) @ gram), count)


def largest_eigenvalue(gram: Float[torch.Tensor, "in in"]) -> float:
    """Return a lower estimate of the largest eigenvalue of a gram, by power iteration."""
    vector = torch.ones(gram.shape[0], device=gram.device)
    for _ in range(POWER_STEPS):
        vector = torch.nn.functional.normalize(gram @ vector, dim=0)
    return float(vector @ gram @ vector)


def _largest(w: Float[torch.Tensor, "out in"], count: int) -> Float[torch.Tensor, "out in"]:
    """Return the `count` largest weights, rounded to fp16, with zeros elsewhere."""
    kept = torch.zeros_like(w)
    at = w.abs().flatten().topk(count).indices
    kept.view(-1)[at] = w.flatten()[at].half().float()
    return kept
