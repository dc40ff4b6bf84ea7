"""The reference product: decode every term, multiply, add up. Slow and plainly right; every other kernel is compared with it."""

from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats import CompressedLayer

__all__ = ["Reference"]


class Reference:
    name: ClassVar[str] = "reference"

    @staticmethod
    def refuses(layer: CompressedLayer) -> str | None:
        return None

    def matmul(self, x: Float[torch.Tensor, "*batch in"], layer: CompressedLayer) -> Float[torch.Tensor, "*batch out"]:
        weight = layer.weight
        if weight.input_map is not None:
            x = weight.input_map.apply(x)
        if layer.input is not None:
            x = layer.input.round(x)
        y = torch.nn.functional.linear(x, weight.terms[0].dequantize().to(x.dtype))
        for term in weight.terms[1:]:
            y = y + torch.nn.functional.linear(x, term.dequantize().to(x.dtype))
        return y if weight.output_map is None else weight.output_map.apply(y)
