"""aespa: coordinate descent on the error of the attention scores (query, key) or of the mixed values (value).

Source   Kim et al. 2024, "Towards Next-Level Post-Training Quantization of Hyper-Scale Transformers", and its public code: the
         objectives, the start from error feedback by columns, and values weighted by the inputs that their head's attention mixes.
Differs  sweeps of coordinate descent (`Descent`) choose the codes, one row of all heads at a time, where the paper learns by 2000 steps
         of gradient descent which weights to round up; a code may move by any number of levels. Parameters are fitted before, weighted
         by the gram's diagonal, without the channel factors (Z-Fold) that its code folds into norms. Keys and queries include their
         rotary positions; its code rotates their grams back and averages over positions.
Needs    gram [in, in]; for queries and keys row_gram [heads, row, row]; for values head_gram [heads, in, in]; float32.
Cost     O(in^3 + sweeps * out * in^2) time, in^3 times the heads for values; O(in^2) memory.
Update   query, key   sum over heads of tr(R E G E'), E = w - w_hat; row r with the others given by a sweep towards
                      w[r] + sum over s of R[r, s] / R[r, r] E[s]
         value        sum over heads of tr(E G_head E')       others   tr(E G E')
Fails    as GPTQ, whose codes it starts from; if a row_gram cannot be factored, the rows of its head are independent: a named fallback.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Block, CompressedWeight, Format, Packed, Params
from bitpress.quantizers.mechanisms.coordinate_descent import LAZY, Descent, prepare_descent
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["Aespa"]


@dataclass(frozen=True)
class Aespa(Quantizer):
    sweeps: int = 6
    relax_every: int = 2
    damp: float = 0.01
    order: Order = "activation"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "row_gram", "head_gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "coordinate descent on the error of attention scores and of mixed values"
    paper: ClassVar[str] = "P236"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    serves: ClassVar[tuple[str, ...]] = ("*", "!tcq*")  # rows one after another, where a path runs through all of them

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, LAZY)
        if self.sweeps < 1 or self.relax_every < 0 or self.relax_every == 1:
            raise UsageError(
                f"sweeps must be 1 or more and relax_every 0 (never) or 2 or more, got {self.sweeps}, {self.relax_every}."
            )

    def relaxed(self, sweep: int) -> bool:
        """Return whether a sweep, counted from 0, rounds nothing."""
        return self.relax_every > 0 and sweep % self.relax_every == 1 and sweep < self.sweeps - 2

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("aespa", self.serves, fmt)
        stats = stats or Stats(0)
        gram = stats.need_gram("aespa")
        w = w.float()
        own = stats.head_gram
        by_row = stats.row_gram if own is None else None
        grams = gram[None] if own is None else own
        heads = len(grams) if by_row is None else len(by_row)
        if w.shape[0] % heads or (by_row is not None and heads * by_row.shape[1] != w.shape[0]):
            raise CalibrationError(f"aespa: statistics of {heads} heads do not fit a weight of {w.shape[0]} rows.")
        fallbacks: list[str] = []
        couplings = None if by_row is None else self._couplings(by_row, fallbacks)
        feedbacks = [prepare(g, self.order, fmt.grid.span, self.damp, self.damp_limit) for g in grams]
        fallbacks += dict.fromkeys(text for feedback in feedbacks for text in feedback.fallbacks)
        importance = torch.stack([f.importance for f in feedbacks]).repeat_interleave(w.shape[0] // len(grams), 0)
        params = fmt.fit(w, importance, shrink_ratios(self.clip, self.steps, self.smallest))
        # From here on every row is its own block, since rows are visited separately.
        alone = Format(fmt.grid, Block(1, fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)[1]), fmt.scale, fmt.layout)
        pieces, gains = [], []
        for rows, g, feedback in zip(
            torch.arange(w.shape[0], device=w.device).chunk(len(grams)), grams, feedbacks, strict=True
        ):
            columns = Columns(alone, w[rows], feedback.importance, (1.0,), static=True, params=_of_rows(fmt, params, rows, w))
            columns.round_(feedback.order, feedback.factor, LAZY)
            descent = prepare_descent(g, feedback.order, fmt.grid.span, self.damp)
            codes, gain = self._descend(w[rows], columns.codes, alone, columns.params, descent, couplings)
            pieces.append(codes)
            gains.append(gain)
        weight = CompressedWeight((Packed.pack(fmt, torch.cat(pieces), params),))
        return Outcome(weight, tuple(fallbacks), {"gain": sum(gains) / len(gains), "heads": float(heads)})

    def _descend(
        self,
        w: torch.Tensor,
        first: torch.Tensor,
        fmt: Format,
        params: Params,
        descent: Descent,
        couplings: Float[torch.Tensor, "heads row row"] | None,
    ) -> tuple[torch.Tensor, float]:
        """Sweep from `codes`; return the new codes of heads (without couplings: rows) whose error fell, and the share of error removed."""
        heads, height = (len(w), 1) if couplings is None else couplings.shape[:2]
        every = torch.arange(len(w), device=w.device)
        visits = [every] if couplings is None else [every[r::height] for r in range(height)]
        picked = [_of_rows(fmt, params, rows, w) for rows in visits]
        codes, start = first.clone(), fmt.decode(first, params)
        w_hat = start
        for sweep in range(self.sweeps):
            w_hat = w_hat.clone()
            for r, (rows, at) in enumerate(zip(visits, picked, strict=True)):
                target = w[rows]
                if couplings is not None:
                    error = (w - w_hat).unflatten(0, (heads, height))
                    error[:, r] = 0.0
                    target = target + (couplings[:, r, None] @ error)[:, 0] / couplings[:, r, r, None]
                if self.relaxed(sweep):
                    w_hat[rows] = descent.relax(target, w_hat[rows])
                else:
                    codes[rows] = descent.sweep(target, w_hat[rows], fmt, at)
                    w_hat[rows] = fmt.decode(codes[rows], at)
        before, after = (_errors(w - part, descent, couplings) for part in (start, w_hat))
        better = (after < before).repeat_interleave(height)
        kept = torch.minimum(before, after).sum()
        return torch.where(better[:, None], codes, first), float(1 - kept / before.sum()) if before.sum() > 0 else 0.0

    def _couplings(self, by_row: Float[torch.Tensor, "heads row row"], fallbacks: list[str]) -> torch.Tensor:
        """Return the damped row grams, divided by their mean diagonal; the identity for one that cannot be factored."""
        one = torch.eye(by_row.shape[1], device=by_row.device)
        mean = by_row.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        damped = by_row / mean + self.damp * one
        failed = torch.linalg.cholesky_ex(torch.where(torch.isfinite(damped), damped, -one)).info != 0
        if failed.any():
            fallbacks.append(
                f"{int(failed.sum())} heads' row grams could not be factored; the rows of these heads are rounded independently"
            )
        return torch.where(failed[:, None, None], one, damped)


def _of_rows(fmt: Format, params: Params, rows: torch.Tensor, w: torch.Tensor) -> Params:
    """Return the parameters of some rows, each row in its own blocks."""
    height = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)[0]
    return {p.name: params[p.name][rows // height] if p.scope == "block" else params[p.name] for p in fmt.grid.params}


def _errors(difference: torch.Tensor, descent: Descent, couplings: torch.Tensor | None) -> torch.Tensor:
    """Return the error of every head, or of every row without couplings."""
    if couplings is None:
        return descent.errors(difference)
    split = difference.unflatten(0, couplings.shape[:2])
    errors: torch.Tensor = ((couplings @ split @ descent.gram) * split).sum((1, 2))
    return errors
