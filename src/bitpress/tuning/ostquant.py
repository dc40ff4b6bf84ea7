"""OSTQuant: pairs of an orthogonal and a diagonal matrix for every input.

Source   Hu et al. 2025, "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better
         Distribution Fitting", known here from its abstract: learned pairs of orthogonal and scaling matrices, and a loss of the model's top
         logits.
Differs  a pair for every input of a block, by the block's output (mse), where the paper learns the whole network by its KL-top loss, with a
         rotation of the hidden states that is folded into the weights around them: here the rotation is online, and the factors are folded
         where a norm or a matrix takes them (`bitpress rotations` learns a folded one, without factors). Rotations are products of two Cayley
         rotations of the most equal orders (`whole`: one of the whole width, up to 1,024 channels), from the identity behind the recipe's
         transforms.
Update   T_in = (R_a ⊗ R_b) T_0 diag(1/s),  R = (I - S)^-1 (I + S),  S = A - A'
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.formats import Map
from bitpress.tuning.cayley import cayley, orders_of, rotation
from bitpress.tuning.learned import Leaf
from bitpress.tuning.learned_maps import LearnedMatrix, MapTuning

__all__ = ["OSTQuant"]


@dataclass(frozen=True, kw_only=True)
class OSTQuant(MapTuning):
    scales: float = 1.0
    whole: bool = False

    summary: ClassVar[str] = "a rotation and factors of channels for every input, by Cayley's map"
    paper: ClassVar[str] = "P188"

    def matrix(self, width: int, device: torch.device) -> LearnedMatrix | None:
        orders = orders_of(width, whole=self.whole)
        return None if orders is None else _Rotations(*orders, device)


class _Rotations:
    def __init__(self, a: int, b: int, device: torch.device) -> None:
        self.moved = [torch.zeros(n, n, device=device, requires_grad=True) for n in (a, b)]

    def leaves(self) -> list[Leaf]:
        return [Leaf(moved) for moved in self.moved]

    def map(self, progress: float) -> Map:
        left, right = (cayley(moved) for moved in self.moved)
        return rotation(left, right)
