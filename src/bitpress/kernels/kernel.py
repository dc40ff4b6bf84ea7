"""What a kernel is: one product, for the weights that it does not refuse."""

from typing import ClassVar, Protocol

import torch
from jaxtyping import Float

from bitpress.formats import CompressedWeight

__all__ = ["Kernel"]


class Kernel(Protocol):
    name: ClassVar[str]

    @staticmethod
    def refuses(weight: CompressedWeight, device: torch.device) -> str | None:
        """Say in one line why this kernel cannot take the weight, or None."""
        ...

    @staticmethod
    def matmul(x: Float[torch.Tensor, "*batch in"], weight: CompressedWeight) -> Float[torch.Tensor, "*batch out"]:
        """Give `x @ w_hat.T` in x's type."""
        ...
