"""SignLowRank: the signs of a matrix times low-rank magnitudes; a stack of such terms can be cut to any number of terms.

    w_hat = s * (a b)          s -1 or 1, a [out, rank], b [rank, in]; the product of s is weight by weight

    signs   uint8 [out, ceil(in / 8)]     one bit a weight, the first one least significant, 1 for +1
    a, b    as those of a low_rank term

Worked example: signs 00000101 of three weights are 1, -1, 1.

Source   Wang et al. 2024, "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory
         Environments", and its public code: the signs and the first `rank` singular vectors of the magnitudes of a residual,
         repeated on the next residual. Inputs are first scaled by their size in calibration, `bit_stack(scale=...)`.
Differs  the singular values go into `b`, as in every low-rank term, where the code splits their square roots; each term is rounded
         to its type before the next is computed, so that the next corrects it.
Needs    nothing.        Cost  a singular value decomposition a term; 1 + 16 rank (out + in) / (out in) bits a weight and term.
Fails    NumericsError when the weight is not finite or a factor is beyond the range of its type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from bitpress.formats.format import Expected
from bitpress.formats.layouts import dense as dense
from bitpress.formats.terms.low_rank import LowRank, low_rank

__all__ = ["SignLowRank", "sign_low_rank"]


@dataclass(frozen=True)
class SignLowRank:
    magnitude: LowRank
    signs: torch.Tensor

    kind: ClassVar[str] = "sign_low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        return self.magnitude.shape

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"signs": self.signs, **self.magnitude.tensors}

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32."""
        positive = dense.unpack(self.signs, 1, self.shape[1]).bool()
        magnitude = self.magnitude.dequantize()
        return torch.where(positive, magnitude, -magnitude)

    def spec(self) -> dict[str, Any]:
        return self.magnitude.spec()

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that this specification implies."""
        return {"signs": (torch.uint8, (shape[0], dense.row_bytes(shape[1], 1))), **LowRank.expected(spec, shape)}

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "SignLowRank":
        factors = {name: t for name, t in tensors.items() if name != "signs"}
        return cls(LowRank.build(spec, shape, factors), tensors["signs"])

    def check(self) -> None:
        """Raise FormatError when a factor is not finite; any bit is a sign."""
        self.magnitude.check()

    def row_slice(self, start: int, stop: int) -> "SignLowRank":
        """Return rows `start` to `stop`: some of one part, or whole parts."""
        return SignLowRank(self.magnitude.row_slice(start, stop), self.signs[start:stop])

    @classmethod
    def stack_rows(cls, terms: Sequence["SignLowRank"]) -> "SignLowRank":
        """Stack terms of one shape, rank and type along the rows; each keeps its own pair."""
        return cls(LowRank.stack_rows([t.magnitude for t in terms]), torch.cat([t.signs for t in terms]))


def sign_low_rank(residual: Float[torch.Tensor, "out in"], rank: int, dtype: str = "fp16") -> SignLowRank:
    """Return the signs of `residual` and its nearest magnitudes of the rank; a zero counts as positive.

    Raises NumericsError when the residual is not finite or a factor does not fit its type, FormatError for a rank that
    the shape cannot have.
    """
    return SignLowRank(low_rank(residual.abs(), rank, dtype), dense.pack((residual >= 0).to(torch.uint8), 1))
