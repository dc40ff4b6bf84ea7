"""AffineQuant: a matrix of the whole input, whose entries are learned from the diagonal outwards.

Source   Ma et al. 2024, "AffineQuant: Affine Transformation Quantization for Large Language Models", and its public code
         (`quantize/affinequant.py`): the mask has the diagonal in the first pass and one band more on each side as passes go on, up to the
         whole matrix; entries beside the diagonal are multiplied by a stability factor (0.1 for W4A4), so that the matrix stays diagonally
         dominant and has an inverse. Clipping of weights as OmniQuant's.
Differs  the matrix starts as the identity behind the recipe's transforms and is computed online beside the weight, where the authors merge
         those of norms and of attention's outputs as far as they are diagonal or of a head. It is as wide as the input up to 1,024 channels;
         a wider input has its diagonal alone. The mask grows at every step. 200 steps of a falling rate.
Update   T_in = I + mask * L,  mask = 1 on the diagonal, `stability` where |i - j| < 1 + (n - 1) progress, else 0
Fails    a matrix that cannot be inverted in float32 ends the learning of its block early.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.errors import UsageError
from bitpress.formats import Affine, Map, Scale
from bitpress.formats.maps.rotations import LARGEST
from bitpress.tuning.learned import Leaf
from bitpress.tuning.learned_maps import LearnedMatrix, MapTuning

__all__ = ["AffineQuant"]


@dataclass(frozen=True, kw_only=True)
class AffineQuant(MapTuning):
    """`stability` multiplies the entries beside the diagonal."""

    clip_weights: float = 2.0
    shifts: float = 1.0
    stability: float = 0.1

    summary: ClassVar[str] = "a matrix of the whole input, learned from its diagonal outwards, with ends of the weights' ranges"
    paper: ClassVar[str] = "P169"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.stability <= 1:
            raise UsageError(f"stability={self.stability:g}: it is more than 0 and at most 1.")

    def matrix(self, width: int, device: torch.device) -> LearnedMatrix:
        return _Banded(width, device, self.stability) if width <= LARGEST else _Diagonal(width, device)


class _Banded:
    def __init__(self, width: int, device: torch.device, stability: float) -> None:
        self.moved = torch.zeros(width, width, device=device, requires_grad=True)
        at = torch.arange(width, device=device)
        self.distance = (at[:, None] - at).abs()
        self.weights = torch.where(self.distance == 0, 1.0, stability)
        self.eye, self.one = torch.eye(width, device=device), torch.ones(1, 1, device=device)

    def leaves(self) -> list[Leaf]:
        return [Leaf(self.moved)]

    def map(self, progress: float) -> Map:
        """Return the matrix as far as its mask goes; no entry beyond it has moved yet."""
        seen = self.distance < 1 + (len(self.eye) - 1) * progress
        return Affine(self.one, self.eye + torch.where(seen, self.weights, 0.0) * self.moved)


class _Diagonal:
    def __init__(self, width: int, device: torch.device) -> None:
        self.moved = torch.zeros(width, device=device, requires_grad=True)

    def leaves(self) -> list[Leaf]:
        return [Leaf(self.moved)]

    def map(self, progress: float) -> Map:
        return Scale(1 + self.moved)
