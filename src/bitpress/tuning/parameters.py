"""Codes stay and their parameters are learned: scales, levels, codebooks, with the norms.

Source   Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization", and its public code
         (`src/finetune.py`, `main.py`): every parameter of a block that is not a code, so codebooks, scales and norms, by Adam on the
         squared error of the block's output. The same with other codes: `quip-sharp`, `decoupleq`, `ptq161` of this table.
Differs  200 steps of a falling rate, where the authors pass over their text up to 5 times at 1e-5 for all alike, with betas of 0.9 and 0.95;
         a rate is relative to the mean size of each parameter. Targets are the uncompressed model's outputs, where the authors take the
         uncompressed block's on the compressed model's inputs (`targets: same`). Parameters that the format stores are learned: codebooks and
         scales for `aq` formats, scales for integers and trellises; zero points that are codes stay.
Update   w_hat = decode(codes, params), params by Adam
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.formats import Term
from bitpress.tuning.fixed_codes import FixedCodes, learned_params
from bitpress.tuning.learned import LearnedTerm, Start
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["Parameters"]


@dataclass(frozen=True, kw_only=True)
class Parameters(Tuning):
    """`rate` is relative to the mean size of each parameter."""

    rate: float | None = 2e-3
    schedule: ScheduleName = "cosine"
    norms: float = 1e-3

    summary: ClassVar[str] = "scales, levels and codebooks under fixed codes, with norms"
    paper: ClassVar[str] = "P295"

    def begin(self, start: Start) -> LearnedTerm | None:
        return FixedCodes(start) if any(p.kind != "code" for p in start.fmt.grid.params) else None

    def begin_beside(self, term: Term) -> LearnedTerm | None:
        return learned_params(term)
