"""Learned diagonals at both ends of a weight's maps, and the maps around its terms."""

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float

from bitpress.formats import Chain, CompressedWeight, Map, Scale, chain
from bitpress.kernels.native_maps import MatrixMap
from bitpress.tuning.leaf import Leaf

__all__ = ["LearnedSides", "MapsAround", "joined_maps"]


class MapsAround:
    """The maps around the terms of a weight, as `CompressedWeight.dequantize` applies them, with their gradients.

    Every step of learning applies them to a whole weight, so they run in native code where it knows them; what is stored is decoded by
    the maps themselves.
    """

    def __init__(self, weight: CompressedWeight) -> None:
        (rows, cols), device = weight.shape, weight.device
        self.input_map = None if weight.input_map is None else MatrixMap.of(weight.input_map, cols, device)
        self.output_map = None if weight.output_map is None else MatrixMap.of(weight.output_map, rows, device)

    def inputs(self, w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        """Return w T_in."""
        return w if self.input_map is None else cast(torch.Tensor, _Mapped.apply(w, self.input_map, "rows"))

    def outputs(self, w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        """Return T_out w."""
        return w if self.output_map is None else cast(torch.Tensor, _Mapped.apply(w, self.output_map, "columns"))


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, change: MatrixMap, axis: Literal["rows", "columns"]) -> torch.Tensor:
        ctx.change, ctx.axis = change, axis
        return change.rows(w, transposed=True) if axis == "rows" else change.columns(w, transposed=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        change, (g,) = ctx.change, gradients
        return (change.rows(g, transposed=False) if ctx.axis == "rows" else change.columns(g, transposed=True)), None, None


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

    def apply(self, w: Float[torch.Tensor, "out in"], maps: MapsAround) -> Float[torch.Tensor, "out in"]:
        """Return the sum of the terms between the weight's maps and the diagonals, in the order of a stored weight."""
        mapped = maps.inputs(w)
        whole = maps.outputs(mapped if self.s is None else mapped * self.s)
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
