"""Learned diagonals at both ends of a weight's maps, and the maps around its terms."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float

from bitpress.formats import Chain, CompressedWeight, Map, Scale, chain
from bitpress.tuning.leaf import Leaf

__all__ = ["AroundTerms", "LearnedSides", "joined_maps"]


class AroundTerms(torch.autograd.Function):
    """The maps around the terms of a weight, as `CompressedWeight.dequantize` applies them."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, input_map: Map | None, output_map: Map | None) -> torch.Tensor:
        ctx.maps = input_map, output_map
        if input_map is not None:
            w = input_map.apply_transposed(w)
        return w if output_map is None else output_map.apply(w.T).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (input_map, output_map), g = ctx.maps, gradients[0]
        if output_map is not None:
            g = output_map.apply_transposed(g.T).T
        return g if input_map is None else input_map.apply(g), None, None


class LearnedSides:
    """Diagonals at both ends of a weight's maps, learned from ones, and stored as scale maps.

    w_hat = diag(t) T_out (sum of terms) T_in diag(s)
    """

    def __init__(self, weight: CompressedWeight, *, inputs: bool, outputs: bool, rate: float = 1.0) -> None:
        rows, cols = weight.shape
        self.s = torch.ones(cols, device=weight.device, requires_grad=True) if inputs else None
        self.t = torch.ones(rows, device=weight.device, requires_grad=True) if outputs else None
        self.rate = rate

    def leaves(self) -> list[Leaf]:
        return [Leaf(side, self.rate) for side in (self.s, self.t) if side is not None]

    def apply(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight) -> Float[torch.Tensor, "out in"]:
        """Return the sum of the terms between the weight's maps and the diagonals, in the order of a stored weight."""
        mapped: torch.Tensor = AroundTerms.apply(w, weight.input_map, None)
        mapped = mapped if self.s is None else mapped * self.s
        whole: torch.Tensor = AroundTerms.apply(mapped, None, weight.output_map)
        return whole if self.t is None else (whole.T * self.t).T

    def harden(self, weight: CompressedWeight) -> CompressedWeight:
        """Return the weight with the diagonals in its maps as they are stored."""
        return self._between(weight, *(None if side is None else side.detach().clone() for side in (self.s, self.t)))

    def around(self, weight: CompressedWeight) -> CompressedWeight:
        """Return the weight with the diagonals in its maps, with their gradients."""
        return self._between(weight, self.s, self.t)

    def _between(self, weight: CompressedWeight, *sides: torch.Tensor | None) -> CompressedWeight:
        """Put diagonals around a weight; two scales in a row become one."""
        s, t = (None if side is None else Scale(side) for side in sides)
        ahead, behind = joined_maps(s, weight.input_map), joined_maps(weight.output_map, t)
        return replace(weight, input_map=chain(*ahead), output_map=chain(*behind))


def joined_maps(*maps: Map | None) -> list[Map]:
    """Return single maps in a row, scales side by side multiplied."""
    joined: list[Map] = []
    for one in maps:
        for single in one.maps if isinstance(one, Chain) else [] if one is None else [one]:
            last = joined[-1] if joined else None
            if isinstance(single, Scale) and isinstance(last, Scale):
                joined[-1] = Scale(last.scale * single.scale)
            else:
                joined.append(single)
    return joined
