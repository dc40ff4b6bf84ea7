"""What every change of target is: hyper-parameters in the constructor, one weight with its input's statistics in the verb.

A recipe's codes are to come near to its weight; a change of target gives them another matrix to come near to, of the same shape and
in the same basis, because the layer's input is no longer what it was. Nothing is stored for it.
"""

from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Target", "TargetStats"]


class TargetStats(InputStats, Protocol):
    """What a change of target reads of the statistics of one input; `calibration.stats.Stats` is one."""

    @property
    def cross(self) -> Float[Tensor, "in in"] | None:
        """(x_original - x).T @ x / tokens."""
        ...


class Target(Protocol):
    """One paper's way to choose what codes aim at.

    needs   names of the statistics that `aim` reads
    sites   none: the network's function is not rewritten
    paper   row of the paper in the catalogue of methods
    """

    needs: ClassVar[frozenset[str]]
    sites: ClassVar[Sites]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def aim(self, w: Float[Tensor, "out in"], stats: TargetStats | None) -> tuple[Float[Tensor, "out in"], tuple[str, ...]]:
        """Give the matrix to aim at, float32, and the named fallbacks taken. Raises CalibrationError."""
        ...
