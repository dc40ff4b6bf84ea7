"""Levels of a block's own: the nearest of them, and the sums that a fit needs to choose them.

`SortedBlocks` sorts the weights of every block once and keeps running sums. The sum between two boundaries is then two look-ups for
any length of block, so the iterations of a fit cost little beside the sort.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats.layouts.dense import code_dtype

__all__ = ["Cells", "SortedBlocks", "level_of", "nearest_sorted", "nearest_unsorted"]


def boundaries(levels: Float[torch.Tensor, "... levels"]) -> Float[torch.Tensor, "... levels_less_one"]:
    """Return the midpoints between neighbouring rising levels; a level is always above the midpoint below it."""
    below_upper = torch.nextafter(levels[..., 1:], torch.full_like(levels[..., 1:], -torch.inf))
    return torch.minimum((levels[..., 1:] + levels[..., :-1]) / 2, below_upper)


def nearest_sorted(
    values: Float[torch.Tensor, "... n"], levels: Float[torch.Tensor, "... 1 levels"], bits: int
) -> Int[torch.Tensor, "... n"]:
    """Return the index of the nearest of a block's rising levels; a midpoint goes to the lower one."""
    return _ranks(values, levels[..., 0, :]).to(code_dtype(bits))


def nearest_unsorted(
    values: Float[torch.Tensor, "... n"], levels: Float[torch.Tensor, "... 1 levels"], bits: int
) -> Int[torch.Tensor, "... n"]:
    """Return the index of the nearest of a block's levels, which may be in any order."""
    rising, order = levels[..., 0, :].sort(dim=-1, stable=True)
    order = order.to(code_dtype(bits)).expand(*values.shape[:-1], order.shape[-1])
    return torch.gather(order, -1, _ranks(values, rising).long())


def level_of(codes: Int[torch.Tensor, "... n"], levels: Float[torch.Tensor, "... 1 levels"]) -> Float[torch.Tensor, "... n"]:
    """Return the level of every code."""
    own = levels[..., 0, :].expand(*codes.shape[:-1], levels.shape[-1])
    return torch.gather(own, -1, codes.long())


def _ranks(values: torch.Tensor, rising: torch.Tensor) -> Int[torch.Tensor, "... n"]:
    middles = boundaries(rising).expand(*values.shape[:-1], rising.shape[-1] - 1)
    return torch.searchsorted(middles.contiguous(), values.contiguous(), out_int32=True)


@dataclass(frozen=True)
class Cells:
    """Sums per cell, `[blocks, cells]` in float64: importance, and importance times weight."""

    importance: Float[torch.Tensor, "blocks cells"]
    moment: Float[torch.Tensor, "blocks cells"]


@dataclass(frozen=True)
class SortedBlocks:
    """Blocks in rising order with running sums in float64, each beginning with 0."""

    values: Float[torch.Tensor, "blocks n"]
    weights: Float[torch.Tensor, "blocks n"]
    importance: Float[torch.Tensor, "blocks n_and_one"]
    moment: Float[torch.Tensor, "blocks n_and_one"]
    square: Float[torch.Tensor, "blocks n_and_one"]

    @classmethod
    def of(cls, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> "SortedBlocks":
        """Sort the blocks; in a block without any importance all weights count the same."""
        values, order = blocks.sort(dim=-1)
        if importance is None:
            weights = torch.ones_like(values)
        else:
            weights = torch.gather(importance.expand(blocks.shape), -1, order)
            weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
        moment = weights.double() * values
        return cls(values, weights, _running(weights.double()), _running(moment), _running(moment * values))

    def cells(self, levels: Float[torch.Tensor, "blocks levels"]) -> Cells:
        """Sum the weights nearest to each of some rising levels."""
        inner = torch.searchsorted(self.values, boundaries(levels).contiguous(), right=True)
        first, last = torch.zeros_like(inner[:, :1]), torch.full_like(inner[:, :1], self.values.shape[1])
        edges = torch.cat([first, inner, last], dim=-1)
        return Cells(self.importance.gather(-1, edges).diff(dim=-1), self.moment.gather(-1, edges).diff(dim=-1))

    def error(self, levels: Float[torch.Tensor, "blocks levels"], cells: Cells) -> Float[torch.Tensor, "blocks 1"]:
        """Return the weighted squared error if every weight takes the level of its cell."""
        levels = levels.double()
        return self.square[:, -1:] + ((levels * cells.importance - 2 * cells.moment) * levels).sum(-1, keepdim=True)

    def edges(self, count: int, even: float) -> Int[torch.Tensor, "blocks edges"]:
        """Return the edges of `count` runs of neighbouring weights, or of single weights if there are at most `count`.

        Runs have equal integrals of the cube root of the density, the best spacing for many levels; a share `even` of them follows the
        number of weights instead. For neighbours a gap apart the density is importance / gap, and the integral of its cube root over
        the gap is importance^(1/3) gap^(2/3).
        """
        blocks, n = self.values.shape
        if n <= count:
            return torch.arange(n + 1, device=self.values.device).expand(blocks, -1)
        gaps = torch.nn.functional.pad(self.values.diff(dim=-1), (1, 0)).double()
        mass = self.weights.double() ** (1 / 3) * gaps ** (2 / 3)
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) * (1 - even) + even / n
        running = mass.cumsum(-1)
        shares = torch.arange(1, count, device=mass.device, dtype=torch.float64) / count
        inner = torch.searchsorted(running, (running[:, -1:] * shares).contiguous())
        return torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], n)], dim=-1)


def _running(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))
