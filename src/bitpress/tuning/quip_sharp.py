"""QuIP#'s fine-tuning: the sign vectors of its Hadamard maps become real vectors, learned with norms under fixed codes.

Source   Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks", and its public code
         (`lib/algo/finetune.py`, `lib/linear/quantized_linear.py`): the vectors SU and SV of every weight, with its scale in SV, by Adam at
         5e-4, norms and the weights not yet compressed at 5e-5, on the squared error of the block's output; the best of 5 passes on held-out
         text is kept. SU and SV are stored in 16 bits.
Differs  learned once behind the block, where the authors learn after every weight, uncompressed weights too, and then the whole model by cross
         entropy. The vectors are stored as scale maps in 32 bits beside the signs. Inputs are the compressed model's (theirs: the
         original's). Scales of the codes are learned too. A weight without maps has no vectors to learn.
Update   w_hat = diag(t) T_out decode(codes, params) T_in diag(s),  s, t from ones
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.formats import CompressedWeight, Term
from bitpress.tuning.fixed_codes import FixedCodes, learned_params
from bitpress.tuning.learned import LearnedTerm, Start
from bitpress.tuning.sides import LearnedSides
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["QuIPSharp"]


@dataclass(frozen=True, kw_only=True)
class QuIPSharp(Tuning):
    """`rate` is that of the vectors, relative to 1; scales of codes have the same, relative to their mean size."""

    rate: float | None = 2e-3
    schedule: ScheduleName = "cosine"
    norms: float = 2e-4
    adds_maps: ClassVar[bool] = True

    summary: ClassVar[str] = "real vectors in place of the signs of Hadamard maps, with scales and norms"
    paper: ClassVar[str] = "P204"

    def begin(self, start: Start) -> LearnedTerm | None:
        return FixedCodes(start) if any(p.kind != "code" for p in start.fmt.grid.params) else None

    def begin_beside(self, term: Term) -> LearnedTerm | None:
        return learned_params(term)

    def begin_sides(self, weight: CompressedWeight) -> LearnedSides | None:
        inputs, outputs = weight.input_map is not None, weight.output_map is not None
        return LearnedSides(weight, inputs=inputs, outputs=outputs) if inputs or outputs else None
