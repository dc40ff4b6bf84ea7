"""SpinQuant: rotations of inputs learned by gradient steps that stay on the manifold of orthogonal matrices.

Source   Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations" (arXiv 2405.16406), and its public code
         (`train_utils/optimizer.py`, `10_optimize_rotation.sh`): Cayley steps at a rate of 1.5 that falls by a cosine, 100 steps of one text on
         8 devices, by the loss of the whole model; R1 for the hidden states, R2 for the values of every head, from random Hadamard matrices.
Differs  a rotation for every input of a block by the block's output, online beside the weight, where R1 and R2 are one for the network and one
         for a head and are folded (`bitpress rotations` learns those). It is a product of two matrices of the most equal orders (`whole`: one of
         the whole width, up to 1,024 channels), from the identity: the transform `hadamard` before it makes the authors' start. How steps differ:
         `tuning.cayley`.
Update   X <- (I + a/2 W)^-1 (I - a/2 W) X,  W = M X' - X M'
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.formats import Map
from bitpress.tuning.cayley import orders_of, rotation
from bitpress.tuning.learned import Leaf
from bitpress.tuning.learned_maps import LearnedMatrix, MapTuning
from bitpress.tuning.tuner import OptimizerName

__all__ = ["SpinQuant"]


@dataclass(frozen=True, kw_only=True)
class SpinQuant(MapTuning):
    """`rate` is the length of a step: the largest sum of what a column's axes are turned by, in radians."""

    rate: float | None = 0.1
    steps: int = 100
    optimizer: OptimizerName = "cayley"
    whole: bool = False

    summary: ClassVar[str] = "a rotation for every input, by steps on the manifold of rotations"
    rotates: ClassVar[bool] = True
    paper: ClassVar[str] = "yardstick: SpinQuant (arXiv 2405.16406)"

    def matrix(self, width: int, device: torch.device) -> LearnedMatrix | None:
        orders = orders_of(width, whole=self.whole)
        return None if orders is None else _Factors(*orders, device)


class _Factors:
    def __init__(self, a: int, b: int, device: torch.device) -> None:
        self.factors = [torch.eye(n, device=device, requires_grad=True) for n in (a, b)]

    def leaves(self) -> list[Leaf]:
        return [Leaf(factor) for factor in self.factors]

    def map(self, progress: float) -> Map:
        left, right = self.factors
        return rotation(left, right)
