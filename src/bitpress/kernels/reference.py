"""The reference product: decode every term, multiply, add up. Slow and plainly right; every other kernel is compared with it."""

from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats import CompressedLayer, CompressedWeight

__all__ = ["Reference"]


class Reference:
    """`keep`: hold the decoded terms from the first product on, so that decoding is done once."""

    name: ClassVar[str] = "reference"

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._kept: list[torch.Tensor] | None = None

    @staticmethod
    def refuses(layer: CompressedLayer) -> str | None:
        return None

    def matmul(self, x: Float[torch.Tensor, "*batch in"], layer: CompressedLayer) -> Float[torch.Tensor, "*batch out"]:
        weight = layer.weight
        if weight.input_map is not None:
            x = weight.input_map.apply(x)
        if layer.input is not None:
            x = layer.input.round(x)
        first, *others = self._decoded(weight, x)
        y = torch.nn.functional.linear(x, first)
        for term in others:
            y = y + torch.nn.functional.linear(x, term)
        return y if weight.output_map is None else weight.output_map.apply(y)

    def _decoded(self, weight: CompressedWeight, x: torch.Tensor) -> list[torch.Tensor]:
        if self._kept is not None and self._kept[0].dtype == x.dtype:
            return self._kept
        decoded = [term.dequantize().to(x) for term in weight.terms]
        if self.keep:
            self._kept = decoded
        return decoded
