"""Softmax bias correction: add the mean error of rounded probabilities of attention back to them.

Source   Pandey et al. 2023, "Softmax Bias Correction for Quantized Generative Models" (P287); its abstract is what could be read: the bias of
         the quantized softmax is estimated offline, and absorbed into the parameters of the quantization at no cost at run time.
Differs  most probabilities of a long text are smaller than half a step and round to 0, so what is missing is positive. The mean error is that of
         the keys that a query sees, over the calibration text, for every attention or every head of queries; keys that are masked or come later
         stay at 0. With each: query nothing is measured: a query's offset is what its rounded probabilities lack to the sum of 1, in equal parts.
Needs    a pass of the calibration text through each block, but for each: query.      Cost  4 bytes a head; an addition a probability.
Update   p_hat = Q(p) + mean(p - Q(p));  for a query: p_hat = Q(p) + (1 - sum Q(p)) / keys
Fails    CalibrationError when no token reached the attention.
"""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import OffsetOf, ProbabilityOffset

__all__ = ["ProbabilityErrors", "SoftmaxBias"]


@dataclass
class ProbabilityErrors:
    """The errors of the rounded probabilities of one attention, summed over a text: by head, with the number of keys that were seen."""

    total: Float[torch.Tensor, " heads"] | None = None
    seen: Float[torch.Tensor, " heads"] | None = None

    def add(self, p: Float[torch.Tensor, "heads rows keys"], rounded: Float[torch.Tensor, "heads rows keys"]) -> None:
        """Take some queries; p is 0 for keys that a query does not see."""
        there = p > 0
        total, seen = torch.where(there, p - rounded, 0.0).double().sum((1, 2)), there.sum((1, 2)).double()
        self.total = total if self.total is None else self.total + total
        self.seen = seen if self.seen is None else self.seen + seen


@dataclass(frozen=True)
class SoftmaxBias:
    """`each` says what has an offset of its own: every "attention", every "head" of queries, or every "query", whose offset is computed at run time."""

    each: OffsetOf = "head"

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "the mean error of rounded probabilities of attention, added to them"
    paper: ClassVar[str] = "P287"

    def __post_init__(self) -> None:
        if self.each not in get_args(OffsetOf):
            raise UsageError(f"each={self.each!r}: it is one of {', '.join(get_args(OffsetOf))}.")

    @property
    def observes(self) -> bool:
        """Whether the calibration text decides the offsets."""
        return self.each != "query"

    def choose(self, errors: ProbabilityErrors | None) -> ProbabilityOffset:
        """Return the offsets by what was seen of an attention, None where nothing has to be. Raises CalibrationError."""
        if not self.observes:
            return ProbabilityOffset(self.each)
        if errors is None or errors.total is None or errors.seen is None:
            raise CalibrationError("softmax-bias: no calibration token reached this attention; its offsets cannot be chosen.")
        if self.each == "attention":
            return ProbabilityOffset(self.each, (errors.total.sum() / errors.seen.sum()).float()[None])
        return ProbabilityOffset(self.each, (errors.total / errors.seen.clamp(min=1)).float())
