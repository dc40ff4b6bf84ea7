"""PTQ1.61's learned factors: one for every row and one for every column of the signs, by the output of a block.

Source   Zhao et al. 2025, "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language Models",
         and its public code (`quantize/blockptq.py`, `models/int_llama_layer.py`): a scale and a factor for every row and a factor for every
         column of the binary part, AdamW at 5e-4 for scales and 1e-3 for factors, on the squared error and the logarithm of the cosine.
Differs  starts from the least squares factors of the quantizer `ptq161` (theirs: mean sizes and ones). Scale and factor of a row are one number.
         One target, the original's output, where theirs adds that of the same inputs. Column factors stand in the input map, so they also reach
         the 4-bit columns, whose scales are learned too.
Update   w_hat[:, j] = a_i s_ij r_j,  a and r by Adam;  loss = squared error - log mean cosine
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.formats import CompressedWeight, Term
from bitpress.tuning.fixed_codes import FixedCodes, learned_params
from bitpress.tuning.learned import LearnedTerm, Start
from bitpress.tuning.sides import LearnedSides
from bitpress.tuning.tuner import LossName, ScheduleName, Tuning

__all__ = ["PTQ161"]

# The rate of a column's factor to that of a row's: 1e-3 to 5e-4 in the authors' code.
COLUMNS = 2.0


@dataclass(frozen=True, kw_only=True)
class PTQ161(Tuning):
    """`rate` is that of row factors, relative to their mean size."""

    rate: float | None = 2e-3
    schedule: ScheduleName = "cosine"
    loss: LossName = "cosine"
    adds_maps: ClassVar[bool] = True

    summary: ClassVar[str] = "row and column factors of signs, by squared error and cosine"
    paper: ClassVar[str] = "P432"
    serves: ClassVar[tuple[str, ...]] = ("binary*",)

    def begin(self, start: Start) -> LearnedTerm | None:
        return FixedCodes(start)

    def begin_beside(self, term: Term) -> LearnedTerm | None:
        return learned_params(term)

    def begin_sides(self, weight: CompressedWeight) -> LearnedSides | None:
        return LearnedSides(weight, inputs=True, outputs=False, rate=COLUMNS)
