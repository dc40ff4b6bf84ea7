"""QuIP's incoherence: balance weights against inputs channel by channel, then mix both sides with random orthogonal matrices.

Source   Chee et al. 2023, "QuIP: 2-Bit Quantization of Large Language Models With Guarantees"; the rescaling as in the authors'
         public code (`method.py`).
Differs  the matrices are the plain products of two factors of near equal order, with a permutation before the one of the inputs: the
         public code's default has a factor for every slice, and a permutation before and after each matrix. Rescaling as in `balance`.
Needs    gram [in, in] float32, for the rescaling.      Cost  8 bytes a channel and 8 n bytes a side (orders of sqrt(n));
         O(sqrt(n)) operations a channel and token.
Update   d = (diag(gram) / diag(w' w))^(1/4),  w' = T_out^-1 (w d) (left ⊗ right)',  T_in = (left ⊗ right) P / d
Fails    FormatError for a width without factors of 1,024 or less, CalibrationError without statistics.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats import Format, Kronecker, Map, Permutation, Scale, chain
from bitpress.transforms.balance import balance, need_gram
from bitpress.transforms.basis import Maps, generator_of
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["OrthogonalBasis"]


@dataclass(frozen=True)
class OrthogonalBasis:
    rescale: bool = True
    permute: bool = True
    outputs: bool = True
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"}), "layer output": frozenset({"online"})}
    summary: ClassVar[str] = "diagonal balance, then random orthogonal matrices (products of two small ones) on both sides"
    paper: ClassVar[str] = "P210"

    def __post_init__(self) -> None:
        generator_of(self.seed, "input", 1)

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        out_features, in_features = w.shape[0], w.shape[1]
        generator = generator_of(self.seed, "input", in_features)
        parts: list[Map] = []
        if self.rescale:
            parts.append(Scale(1 / balance(w, need_gram(stats, "orthogonal"))))
        if self.permute:
            parts.append(Permutation.of(torch.randperm(in_features, generator=generator)))
        parts.append(Kronecker.random(in_features, generator))
        if not self.outputs:
            return chain(*parts), None
        return chain(*parts), Kronecker.random(out_features, generator_of(self.seed, "output", out_features))
