"""OneBit: the signs of a weight between a factor for every output and one for every input.

Source   Xu et al. 2024, "OneBit: Towards Extremely Low-bit Large Language Models": sign-value-independent decomposition, the start of
         its training; the factors and how they differ from the paper's are in `formats.one_bit`.
Differs  the paper trains the factors and the signs afterwards, which it needs to be of use; here the start alone, a baseline for
         1-bit methods. The singular value decomposition and the non-negative factorization that it compares agree at rank one.
Needs    nothing.                   Cost  O(out * in) a step, 50 at most.
Update   w_hat = diag(a) sign(w) diag(b),  a b' the matrix of rank one nearest to |w|
Fails    NumericsError when a weight is not finite.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.formats import Format
from bitpress.formats.one_bit import one_bit
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["OneBit"]


@dataclass(frozen=True)
class OneBit(Quantizer):
    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "signs, a factor for every output and one for every input; the start of the paper's training"
    paper: ClassVar[str] = "P203"
    bits: ClassVar[tuple[float, float]] = (1, 1)
    serves: ClassVar[tuple[str, ...]] = ("binary-tensor",)

    @property
    def keeps_map(self) -> bool:
        return True

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("one_bit", self.serves, fmt)
        return Outcome(one_bit(w))
