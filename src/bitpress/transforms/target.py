"""Target, the protocol of changes of target: hyper-parameters in the constructor, a weight and its input's statistics in `aim`.

Codes normally approximate the weight. A change of target replaces the weight by another matrix, of the same shape and in the same
basis, because the layer's input has changed. Nothing is stored for it.
"""

from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Target", "TargetStats"]


class TargetStats(InputStats, Protocol):
    """The statistics of one input that a change of target reads; `calibration.stats.Stats` is one."""

    @property
    def cross(self) -> Float[Tensor, "in in"] | None:
        """(x_original - x).T @ x / tokens."""
        ...


class Target(Protocol):
    """One paper's way to choose the matrix that the codes approximate.

    needs   names of the statistics that `aim` reads
    sites   none: the network's function is not rewritten
    paper   row of the paper in the catalogue of methods
    """

    needs: ClassVar[frozenset[str]]
    sites: ClassVar[Sites]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def aim(self, w: Float[Tensor, "out in"], stats: TargetStats | None) -> tuple[Float[Tensor, "out in"], tuple[str, ...]]:
        """Return the matrix to approximate, float32, and the names of the fallbacks taken. Raises CalibrationError."""
        ...
