"""CBQ: windows of blocks that overlap, with roundings whose soft bits are moved by a matrix of low rank.

Source   Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models", known here from its abstract and summaries of it: blocks in a
         row are learned together in windows that overlap, steps and LoRA-Rounding: the change of AdaRound's bits is a product of two thin matrices.
Differs  the squared error behind the window, to the uncompressed model's output; an overlapping block is compressed and learned anew in the next
         window, where the paper goes on from what the one before left. The factors move the inverse of the soft bit, which begins on the side of
         the closed form's code; rank 8, and U from a draw. The regulariser weighs a thousandth of AdaRound's: factors that all bits share can
         decide these only by growing, which turns many to the wrong side (a weight of 0.1 costs more than rounding to nearest). Scales are
         learned relative to their size. The coarse-to-fine truncation of outliers comes before all that: transforms and clipping of the recipe
         stand for it.
Update   w_hat = (clamp(floor(w / s) + h(v + L U) + z, 0, top) - z) s,  L from zeros, L, U and s by Adam, with AdaRound's regulariser
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.errors import UsageError
from bitpress.formats.grids.grid import Params
from bitpress.tuning.adaround import AdaRound, SoftBits
from bitpress.tuning.learned import Leaf, LearnedCodes, Start
from bitpress.tuning.tuner import Span

__all__ = ["CBQ"]


@dataclass(frozen=True, kw_only=True)
class CBQ(AdaRound):
    """`rate` is that of the factors; scales have `scales` times as much, relative to their mean size."""

    span: Span = "windows"
    window: int = 2
    overlap: int = 1
    weight: float = 1e-4
    rank: int = 8
    scales: float = 0.1

    summary: ClassVar[str] = "roundings by soft bits with a change of low rank, over windows of blocks that overlap"
    paper: ClassVar[str] = "P167"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"rank={self.rank}: it is 1 or more.")

    def begin(self, start: Start) -> LearnedCodes:
        return _LowRankBits(start, self.weight, self.rank, self.scales, self.seed)


class _LowRankBits(SoftBits):
    def __init__(self, start: Start, weight: float, rank: int, rate: float, seed: int) -> None:
        super().__init__(start, weight)
        rows, cols = start.target.shape
        rank = min(rank, rows, cols)
        like = self.base
        self.given_bits = self.fmt.from_blocks(self.bits.detach(), rows)
        drawn = torch.randn(rank, cols, generator=torch.Generator().manual_seed(seed)) / rank**0.5
        self.left = like.new_zeros(rows, rank).requires_grad_()
        self.right = drawn.to(like.device).requires_grad_()
        self.moved = torch.zeros_like(self.given["scale"], requires_grad=True)
        self.unit = self.given["scale"].abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        self.rate = rate

    def leaves(self) -> list[Leaf]:
        return [Leaf(self.left), Leaf(self.right), Leaf(self.moved, self.rate)]

    def params(self) -> Params:
        return {**self.given, "scale": self.given["scale"] + self.moved * self.unit}

    def soft(self) -> torch.Tensor:
        return self.fmt.to_blocks(self.given_bits + self.left @ self.right)

    def across(self) -> torch.Tensor:
        return self.fmt.per_block(self.stored_params())["scale"]
