"""FlatQuant: a product of two small invertible matrices for every input, with channel factors and learned clipping of weights and inputs.

Source   Sun et al. 2024, "FlatQuant: Flatness Matters for LLM Quantization", and its public code (`flatquant/trans_utils.py`,
         `flatquant/flat_linear.py`, `flatquant/train_utils.py`): left ⊗ right of the most equal orders, factors of channels before it, sigmoids
         from 4 for the ends of rows of weights and of tokens; AdamW at 5e-3, ten times that for clipping, falling by a cosine; 15 passes over
         128 texts, 4 a step, on the squared error of the block's output.
Differs  the matrices are learned directly (`InvDecomposeTransMatrix` there; its default is a singular value decomposition of Cayley rotations)
         from the identity behind the recipe's transforms, where the authors start from random rotations and factors of `smoothquant`'s kind.
         Factors are folded where a norm or a matrix takes them. Queries, keys and values of the cache have no transforms. 200 steps.
Update   T_in = (left ⊗ right) T_0 diag(1/s),  w_hat = Q(clip(w T_in^-1)) T_in
Fails    a matrix that cannot be inverted in float32 ends the learning of its block early.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.formats import Affine, Map
from bitpress.tuning.cayley import orders_of
from bitpress.tuning.learned import Leaf
from bitpress.tuning.learned_maps import LearnedMatrix, MapTuning

__all__ = ["FlatQuant"]


@dataclass(frozen=True, kw_only=True)
class FlatQuant(MapTuning):
    scales: float = 1.0
    clip_weights: float = 10.0
    clip_inputs: float = 10.0

    summary: ClassVar[str] = "a product of two small matrices and factors of channels, with clipping of weights and inputs"
    paper: ClassVar[str] = "P264"

    def matrix(self, width: int, device: torch.device) -> LearnedMatrix | None:
        orders = orders_of(width, whole=False)
        return None if orders is None else _Product(*orders, device)


class _Product:
    def __init__(self, a: int, b: int, device: torch.device) -> None:
        self.moved = [torch.zeros(n, n, device=device, requires_grad=True) for n in (a, b)]
        self.eyes = [torch.eye(n, device=device) for n in (a, b)]

    def leaves(self) -> list[Leaf]:
        return [Leaf(moved) for moved in self.moved]

    def map(self, progress: float) -> Map:
        left, right = (eye + moved for eye, moved in zip(self.eyes, self.moved, strict=True))
        return Affine(left, right)
