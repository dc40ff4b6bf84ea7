"""The protocol of corrections: hyper-parameters in the constructor, one weight with its statistics in the verbs.

A correction takes a term out of the weight before it is quantized (`split`), or adds one for the error of the codes (`repair`); a verb
that it does not use returns None. Like a quantizer it is pure.
"""

from typing import ClassVar, Protocol

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.formats import CompressedWeight, Format, Term

__all__ = ["Correction"]


class Correction(Protocol):
    """One paper's term beside the codes.

    needs   names from `calibration.stats.STATISTICS`
    paper   row of the paper in the catalogue of methods

    `stats` is None if nothing is known of the input (an expert without tokens); every channel then counts alike.
    Both verbs raise CalibrationError if a statistic of `needs` is missing, and NumericsError for a weight that is not finite.
    """

    needs: ClassVar[frozenset[str]]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        """Return the bytes stored for `parts` weights of a shape. Raises FormatError for a shape that cannot have such a term."""
        ...

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Term | None:
        """Return the term to take out; the quantizer gets the weight minus this term, and the format `fmt` for it."""
        ...

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> Term | None:
        """Return the term to add to `weight`, which has no maps, to bring it nearer to `w`."""
        ...
