"""ApiQ: the ends of ranges and a low-rank term are learned together, by the output of a block.

Source   Liao et al. 2024, "ApiQ: Finetuning of 2-Bit Quantized Large Language Model", and its public code (`apiq/calibrate.py`,
         `scripts/quantize.sh`): OmniQuant's sigmoids at 5e-3 and LoRA's factors at 5e-4, AdamW with a decay of 0.1, 20 passes over 128 texts, on
         the squared error to the uncompressed model's output (and, by a setting, to that of the same inputs).
Differs  the factors start from a correction of the recipe, and codes from a closed form's for what the factors leave; theirs start from LoRA's
         draw with a product of 0 and from the weight itself. No decay; factors have the rate that is relative to their mean size; one target.
Update   w_hat = Q(w - a0 b0; sigmoids) + a b,  sigmoids, a and b by Adam
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.formats import LowRank, Term
from bitpress.tuning.learned import LearnedTerm
from bitpress.tuning.learned_clipping import LearnedClipping
from bitpress.tuning.low_rank import LearnedFactors
from bitpress.tuning.tuner import ScheduleName

__all__ = ["ApiQ"]


@dataclass(frozen=True, kw_only=True)
class ApiQ(LearnedClipping):
    """`rate` is that of the sigmoids; factors have `factors` times as much, relative to their mean size."""

    rate: float | None = 5e-3
    schedule: ScheduleName = "cosine"
    factors: float = 1.0

    summary: ClassVar[str] = "ends of ranges with the factors of a low-rank term"
    paper: ClassVar[str] = "P220"

    def begin_beside(self, term: Term) -> LearnedTerm | None:
        return LearnedFactors(term, self.factors) if isinstance(term, LowRank) and term.parts == 1 else None
