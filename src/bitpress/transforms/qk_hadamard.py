"""Rotated scores: an online Hadamard rotation of the channels of each head of queries and keys, behind rotary positions, before they are rounded.

Source   Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", and its public code (`rotation_utils.py`,
         `QKRotationWrapper`); R3 in the names of SpinQuant (Liu et al. 2024).
Differs  signs are drawn at random before the Hadamard matrix, where the code has none; `signs: false` is the code's. Heads whose width is no
         power of two have the matrix of `formats.maps.rotations`, where the code refuses them. All heads of all blocks have the same rotation.
Needs    nothing.        Cost  1 bit a channel of a head; `operations` additions for each head of queries and keys and token.
Update   (T q)' (T k) = q' k,  T = H diag(signs)
Fails    FormatError for a head whose odd part is above 1,024.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from bitpress.errors import UsageError
from bitpress.formats import Hadamard
from bitpress.transforms.basis import generator_of
from bitpress.transforms.sites import Sites

__all__ = ["QKHadamard"]


@dataclass(frozen=True)
class QKHadamard:
    """`signs` says whether channels change signs at random before they are mixed."""

    signs: bool = True
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[Sites] = {"query/key": frozenset({"online"})}
    summary: ClassVar[str] = "Hadamard rotation of each head of queries and keys, behind rotary positions"
    paper: ClassVar[str] = "yardstick: QuaRot"

    def __post_init__(self) -> None:
        if type(self.signs) is not bool:
            raise UsageError(f"signs={self.signs!r}: it is true or false.")
        generator_of(self.seed, "query/key", 1)

    def plan(self, row: int) -> Hadamard:
        """Return the rotation of heads of `row` channels. Raises FormatError."""
        drawn = Hadamard.random(row, row, generator_of(self.seed, "query/key", row))
        return drawn if self.signs else Hadamard(row, row, drawn.core, drawn.signs.new_zeros(drawn.signs.shape))

    @staticmethod
    def operations(row: int) -> int:
        """Return the multiplications and additions that one token of one head of `row` channels takes: core + log2(row / core) a channel."""
        core = Hadamard.random(row, row, generator_of(0, "query/key", row)).core
        return row * ((core if core > 1 else 0) + round(math.log2(row // core)))
