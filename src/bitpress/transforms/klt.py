"""The Karhunen-Loeve basis: decorrelate the channels of an input, largest variance first, then mix them so that all are alike.

Source   Xu et al. 2025, "MambaQuant: Quantizing the Mamba Family with Variance Aligned Rotation Methods" (P347): its abstract is what could be
         read: a rotation by the eigenvectors of the inputs' covariance before a Hadamard rotation makes variances alike. With `parts`
         above 1, the first part is the principal subspace of Saxena et al. 2024, "ResQ" (P272), which rotates inside each part.
Differs  the eigenvectors are those of a product of two small matrices, left ⊗ right, that of the covariance's partial traces: a matrix of the
         whole width for every input is stored and computed only where `whole` says so. Second moments stand for the covariance: means
         are rounded too. A Hadamard matrix in each part, where ResQ has a random rotation. Its smooth-fused rotation is `smoothquant`
         before this.
Needs    gram [in, in] float32.      Cost  4 (a^2 + b^2) bytes with n = a b, or 4 n^2 with `whole`; as many operations for n values.
Update   T_in = H P (U_a ⊗ U_b)',  U of  tr_b gram, tr_a gram;  P sorts the variances
Fails    FormatError for a width without factors of 1,024 or less, or that `parts` does not divide; CalibrationError without statistics.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, UsageError
from bitpress.formats import Format, Hadamard, Kronecker, Permutation, chain
from bitpress.transforms.balance import need_gram
from bitpress.transforms.basis import Maps, generator_of
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["KLT"]


@dataclass(frozen=True)
class KLT:
    """`parts` of equal width, largest variances first, are mixed each for itself; `whole` takes the matrix of the whole width."""

    parts: int = 1
    whole: bool = False
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = "decorrelate inputs and sort by variance, then mix them by a random Hadamard rotation"
    paper: ClassVar[str] = "P347"

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise UsageError(f"parts={self.parts}: there is 1 or more.")
        generator_of(self.seed, "input", 1)

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        gram, width = need_gram(stats, "klt").double().cpu(), w.shape[1]
        if width % self.parts:
            raise FormatError(f"klt: a width of {width} channels is not a multiple of parts={self.parts}.")
        a = 1 if self.whole else max(d for d in range(1, math.isqrt(width) + 1) if width % d == 0)
        Kronecker.expected({"left": a}, width)  # raises for a factor that is too large
        square = gram.reshape(a, width // a, a, width // a)
        change = Kronecker(*(_eigenvectors(square.diagonal(dim1=i, dim2=i + 2).sum(-1)) for i in (1, 0)))
        spread = change.apply(change.apply(gram.float()).T).diagonal()
        order = Permutation.of(spread.argsort(descending=True, stable=True))
        mixing = Hadamard.random(width, width // self.parts, generator_of(self.seed, "input", width))
        return chain(change, order, mixing), None


def _eigenvectors(moments: Float[torch.Tensor, "n n"]) -> Float[torch.Tensor, "n n"]:
    """Return eigenvectors as rows, largest eigenvalue first."""
    vectors: torch.Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors.flip(1).T.float().contiguous()
