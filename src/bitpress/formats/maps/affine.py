"""Affine: a product of two small invertible matrices, as learned transforms end that are no rotations.

    T = left ⊗ right          matrices of orders a and b, a * b = n; with a = 1 one matrix of the whole width

Rows of a weight whose inputs are mapped by T change by T^-T, which is computed in float64 where it is asked for; only T is stored.

Source   The decomposed transform of FlatQuant (Sun et al. 2024) and its public code (`flatquant/trans_utils.py`); with a = 1 the matrix of
         AffineQuant (Ma et al. 2024).
Needs    a^2 + b^2 float32.      Cost  O(n (a + b)) a vector.
Fails    FormatError for factors that do not multiply to the width, that are not finite or cannot be inverted in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.errors import FormatError
from bitpress.formats.maps.rotations import Factors

__all__ = ["Affine"]

# The largest ratio of the singular values of a factor: float32 keeps three digits of what it maps there and back.
CONDITION = 1e4


@dataclass(frozen=True)
class Affine(Factors):
    """Factors that have an inverse."""

    kind: ClassVar[str] = "affine"
    called: ClassVar[str] = "an affine map"
    beyond: ClassVar[str] = "factors of more equal orders"

    def dual(self) -> "Affine":
        """Return T^-T. Raises FormatError where a factor has no inverse."""
        try:
            left, right = (torch.linalg.inv(factor.double()).T.float() for factor in (self.left, self.right))
        except RuntimeError as error:  # torch.linalg.LinAlgError
            raise FormatError("an affine map has a factor without an inverse.") from error
        return Affine(left, right)

    def check(self) -> None:
        for name, factor in self.tensors().items():
            if not bool(torch.isfinite(factor).all()):
                raise FormatError(f"the factor {name} of an affine map holds a NaN or an infinity.")
            values = torch.linalg.svdvals(factor.double())
            if not 0 < float(values[0]) <= CONDITION * float(values[-1]):
                raise FormatError(f"the factor {name} of an affine map cannot be inverted in float32.")
