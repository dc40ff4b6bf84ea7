"""The product of one layer with its bias, wherever a module of the original stands: y = T_out (sum of terms) Q(T_in x) + bias."""

import torch
from jaxtyping import Float

from bitpress.formats import CompressedLayer
from bitpress.kernels.reference import Reference
from bitpress.kernels.table import choose_kernel

__all__ = ["LayerProduct"]


class LayerProduct:
    """A product by the kernel that takes the layer, or with `keep` by decoded weights that are held; models of transformers and streamed ones
    both compute it."""

    def __init__(self, layer: CompressedLayer, *, keep: bool = False) -> None:
        self.layer, self.kernel = layer, Reference(keep=True) if keep else choose_kernel(layer)

    def __call__(
        self, x: Float[torch.Tensor, "*batch in"], bias: Float[torch.Tensor, " out"] | None
    ) -> Float[torch.Tensor, "*batch out"]:
        y = self.kernel.matmul(x, self.layer)
        return y if bias is None else y + bias
