"""A tensor that is learned."""

from dataclasses import dataclass

import torch

__all__ = ["Leaf"]


@dataclass(frozen=True)
class Leaf:
    """A tensor that is learned. `rate` multiplies the learning rate; after every step values are put between `low` and `high`."""

    tensor: torch.Tensor
    rate: float = 1.0
    low: float | None = None
    high: float | None = None
