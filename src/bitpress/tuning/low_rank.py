"""INT2.1's error correction: the low-rank term beside fixed codes is learned.

Source   Chai et al. 2023, "INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation",
         known here from its abstract: added low-rank layers are trained so that the quantized model's outputs come near the original's.
Differs  block by block on the squared error of the output, where the paper trains the whole model on its outputs. The factors start from a
         correction of the recipe (`lqer`, `lorc`, `qera`, `svdquant`, `loftq`) and not from an empty term; a recipe without one learns
         nothing. With `scales`, parameters of the codes are learned with them, as in `parameters`.
Update   w_hat = decode(codes) + a b,  a and b by Adam, rounded as stored
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats import LowRank, Term
from bitpress.tuning.fixed_codes import FixedCodes, learned_params
from bitpress.tuning.learned import Leaf, LearnedTerm, Start
from bitpress.tuning.relaxation import pass_through
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["LearnedFactors", "LowRankFactors"]


@dataclass(frozen=True, kw_only=True)
class LowRankFactors(Tuning):
    """`rate` is relative to the mean size of each factor."""

    rate: float | None = 5e-3
    schedule: ScheduleName = "cosine"
    scales: bool = False

    summary: ClassVar[str] = "the factors of a low-rank term beside fixed codes"
    paper: ClassVar[str] = "P238"

    def begin(self, start: Start) -> LearnedTerm | None:
        moves = self.scales and any(p.kind != "code" for p in start.fmt.grid.params)
        return FixedCodes(start) if moves else None

    def begin_beside(self, term: Term) -> LearnedTerm | None:
        if isinstance(term, LowRank) and term.parts == 1:
            return LearnedFactors(term)
        return learned_params(term) if self.scales else None


class LearnedFactors:
    """Both factors of a low-rank term, relative to their mean size."""

    def __init__(self, term: LowRank, rate: float = 1.0) -> None:
        self.term, self.given, self.rate = term, term.factors(), rate
        self.moved = [torch.zeros_like(factor, requires_grad=True) for factor in self.given]
        self.units = [factor.abs().mean().clamp_min(torch.finfo(torch.float32).tiny) for factor in self.given]

    def leaves(self) -> list[Leaf]:
        return [Leaf(t, self.rate) for t in self.moved]

    def penalty(self, progress: float) -> None:
        return None

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        now = self._factors()
        stored = LowRank.store(now[0].detach(), now[1].detach(), self.term.dtype).factors()
        a, b = (pass_through(x, kept) for x, kept in zip(now, stored, strict=True))
        return (a[None] @ b[None])[0]  # to the last bit as the stored term is decoded

    @torch.no_grad()
    def harden(self) -> LowRank:
        return LowRank.store(*self._factors(), self.term.dtype)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (given + moved * unit for given, moved, unit in zip(self.given, self.moved, self.units, strict=True))
        return a, b
