"""Affine: a product of two small invertible matrices, as learned transforms end that are no rotations.

    T = left ⊗ right          matrices of orders a and b, a * b = n; with a = 1 one matrix of the whole width

Rows of a weight whose inputs are mapped by T change by T^-T, which is computed in float64 where it is asked for; only T is stored.

Source   The decomposed transform of FlatQuant (Sun et al. 2024) and its public code (`flatquant/trans_utils.py`); with a = 1 the matrix of
         AffineQuant (Ma et al. 2024).
Needs    a^2 + b^2 float32.      Cost  O(n (a + b)) a vector.
Fails    FormatError for factors that do not multiply to the width, that are not finite or cannot be inverted in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import FormatError
from bitpress.formats.format import Expected
from bitpress.formats.maps.rotations import LARGEST, multiply_factors

__all__ = ["Affine"]

# The largest ratio of the singular values of a factor: float32 keeps three digits of what it maps there and back.
CONDITION = 1e4


@dataclass(frozen=True)
class Affine:
    """Multiply by `left` across and by `right` along the rows of the vector seen as a matrix [a, b]."""

    left: Float[torch.Tensor, "a a"]
    right: Float[torch.Tensor, "b b"]
    kind: ClassVar[str] = "affine"

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return _mix(x, self.left, self.right)

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return _mix(x, self.left.T, self.right.T)

    def dual(self) -> "Affine":
        """Return T^-T. Raises FormatError where a factor has no inverse."""
        try:
            left, right = (torch.linalg.inv(factor.double()).T.float() for factor in (self.left, self.right))
        except RuntimeError as error:  # torch.linalg.LinAlgError
            raise FormatError("an affine map has a factor without an inverse.") from error
        return Affine(left, right)

    def spec(self) -> dict[str, Any]:
        return {"left": self.left.shape[0]}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"left": self.left, "right": self.right}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        a = spec.get("left")
        if set(spec) != {"left"} or type(a) is not int or a < 1 or size % a:
            raise FormatError(f"an affine map needs the order `left`, a divisor of the width {size}, got {spec}.")
        b = size // a
        if max(a, b) > LARGEST:
            raise FormatError(f"an affine map of {a} by {b} has a factor above {LARGEST}; use factors of more equal orders.")
        return {"left": (torch.float32, (a, a)), "right": (torch.float32, (b, b))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Affine":
        return cls(tensors["left"], tensors["right"])

    def check(self) -> None:
        for name, factor in self.tensors().items():
            if not bool(torch.isfinite(factor).all()):
                raise FormatError(f"the factor {name} of an affine map holds a NaN or an infinity.")
            values = torch.linalg.svdvals(factor.double())
            if not 0 < float(values[0]) <= CONDITION * float(values[-1]):
                raise FormatError(f"the factor {name} of an affine map cannot be inverted in float32.")


def _mix(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return multiply_factors(x.reshape(-1, left.shape[0] * right.shape[0]), [left, right]).reshape(x.shape)
