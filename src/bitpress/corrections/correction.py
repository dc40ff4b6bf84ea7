"""What every correction is: hyper-parameters in the constructor, one weight with its statistics in the verbs.

A correction takes a term out of the weight before the quantizer sees it (`split`), or adds one for what the codes have left
(`repair`); None where it does not do that. Like a quantizer it is pure.
"""

from typing import ClassVar, Protocol

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.formats import CompressedWeight, Term

__all__ = ["Correction"]


class Correction(Protocol):
    """One paper's term beside the codes.

    needs   names from `calibration.stats.STATISTICS`
    paper   row of the paper in the catalogue of methods

    `stats` None stands for an input that nothing is known of (an expert without tokens): every channel then counts alike.
    Both verbs raise CalibrationError for statistics without what `needs` asks for, NumericsError for a weight that is not finite.
    """

    needs: ClassVar[frozenset[str]]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        """Return the bytes stored for `parts` weights of a shape. Raises FormatError for a shape that cannot have such a term."""
        ...

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None) -> Term | None:
        """Return the term that the quantizer is not to see; it gets the weight less this term."""
        ...

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> Term | None:
        """Return the term to add to `weight`, which has no maps, so that it comes nearer to `w`."""
        ...
