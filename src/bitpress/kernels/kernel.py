"""Kernel, the protocol of kernels: one product, for the layers that it does not refuse.

The table holds classes. An instance is made for one layer when the layer is loaded, and may keep tensors derived from the layer's own.
"""

from typing import ClassVar, Protocol

import torch
from jaxtyping import Float

from bitpress.formats import CompressedLayer

__all__ = ["Kernel"]


class Kernel(Protocol):
    name: ClassVar[str]

    @staticmethod
    def refuses(layer: CompressedLayer) -> str | None:
        """Say in one line why this kernel cannot take the layer, or None."""
        ...

    def matmul(self, x: Float[torch.Tensor, "*batch in"], layer: CompressedLayer) -> Float[torch.Tensor, "*batch out"]:
        """Return `T_out (sum of terms) Q(T_in x)` in x's type. `layer` is the one that the kernel was made for."""
        ...
