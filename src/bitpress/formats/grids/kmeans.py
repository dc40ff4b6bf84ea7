"""K-means: every block has its own 2^bits levels, placed by the density and the importance of its weights.

Source   Kim et al. 2023, "SqueezeLLM: Dense-and-Sparse Quantization": 1-D k-means weighted by sensitivity, one table a row; the
         outliers that it takes out first are a separate term here. Its public code runs scikit-learn's k-means, 50 iterations.
Differs  all blocks at once: the weights are sorted and Lloyd's steps read running sums. The start is not random but the
         best of all cuts between 64 runs of the sorted weights (dynamic programming; optimal for a block of up to 64 weights).
         A block of at most 2^bits different weights stores them exactly. Zero weights count like the others.
Needs    importance per weight, the squared gradients in the paper; without it all count alike.
Cost     one sort of the weights, and 2 bytes times 2^bits a block: 0.06 bits a weight for 16 levels and rows of 4,096.

    w_hat = levels[code]         levels rise; float16
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.block_levels import SortedBlocks, level_of, nearest_sorted
from bitpress.formats.grids.grid import Params, StoredParam

__all__ = ["KMeans", "cluster"]

# Lloyd's steps end after this many, or when no level moves; the paper's code also stops at 50.
STEPS = 50
# Runs of sorted weights between which the start may cut, and blocks handled together: 1 MB, which stays in the processor's cache.
RUNS = 64
TOGETHER = 32
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class KMeans:
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"{self.name}: a table of levels needs 1 to 8 bits.")

    @property
    def name(self) -> str:
        return f"kmeans{self.bits}"

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def num_codes(self) -> int:
        return 1 << self.bits

    @property
    def span(self) -> int:
        return 1

    @property
    def usual_scale(self) -> str:
        """The scale type of a format that names none; no scale is stored."""
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("levels", "value", shape=(self.num_codes,)),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the levels of every block; those of a block of zeros are zeros."""
        return {"levels": cluster(SortedBlocks.of(blocks, importance), self.num_codes)[:, None]}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        return nearest_sorted(values, params["levels"], self.bits)

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        return level_of(codes, params["levels"])

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a level."""


def cluster(blocks: SortedBlocks, count: int) -> Float[torch.Tensor, "blocks levels"]:
    """Return `count` rising levels per block with a small squared error."""
    return _distinct(blocks, _lloyd(blocks, _best_cuts(blocks, count)))


def _best_cuts(blocks: SortedBlocks, count: int) -> Float[torch.Tensor, "blocks levels"]:
    """Return the means of the `count` cells of least total cost, with ends at a few edges, by dynamic programming."""
    edges = blocks.edges(RUNS, 0.001)
    sums = [running.gather(-1, edges) for running in (blocks.importance, blocks.moment, blocks.square)]
    parts = zip(*(s.split(TOGETHER) for s in sums), strict=True)
    cuts = torch.cat([_cut(importance, moment, square, count) for importance, moment, square in parts])
    importance, moment = (s.gather(-1, cuts).diff(dim=-1) for s in sums[:2])
    # An empty cell repeats the level below it; empty first cells take the smallest weight.
    mean = torch.where(importance > 0, moment / importance.clamp(min=_TINY), blocks.values[:, :1].double())
    return mean.float().cummax(-1).values


def _cut(
    importance: Float[torch.Tensor, "blocks edges"],
    moment: Float[torch.Tensor, "blocks edges"],
    square: Float[torch.Tensor, "blocks edges"],
    count: int,
) -> Int[torch.Tensor, "blocks cuts"]:
    """Return the edges, first and last included, between which the squared error around the means is least."""
    within, mean, cost = (s[:, :, None] - s[:, None, :] for s in (importance, moment, square))
    # cost[:, j, i]: the cost of one cell from edge i to edge j; infinite if j < i.
    cost = cost.sub_(mean.square_().div_(within.clamp_(min=_TINY))).clamp_(min=0.0).float()
    cost += torch.full_like(cost[0], torch.inf).triu(1)
    best = [cost[:, :, 0]]
    sums = torch.empty_like(cost)
    for _ in range(count - 1):
        best.append(torch.add(cost, best[-1][:, None, :], out=sums).amin(-1))
    last = torch.full_like(cost[:, :1, 0], cost.shape[1] - 1, dtype=torch.int64)
    cuts = [last]
    for before in reversed(best[:-1]):
        # The edges are recomputed for the best path only: storing all of them takes four times as long.
        ends = cost.gather(1, cuts[-1][..., None].expand(-1, 1, cost.shape[2]))[:, 0]
        cuts.append((before + ends).argmin(-1, keepdim=True))
    return torch.cat([torch.zeros_like(last), *reversed(cuts)], dim=-1)


def _lloyd(blocks: SortedBlocks, levels: Float[torch.Tensor, "blocks levels"]) -> Float[torch.Tensor, "blocks levels"]:
    """Move every level to the mean of its nearest weights until none moves; a level without weights stays."""
    for _ in range(STEPS):
        cells = blocks.cells(levels)
        mean = (cells.moment / cells.importance.clamp(min=_TINY)).float()
        # Rounding of the sums can put two close means out of order.
        moved = torch.where(cells.importance > 0, mean, levels).cummax(-1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _distinct(blocks: SortedBlocks, levels: Float[torch.Tensor, "blocks levels"]) -> Float[torch.Tensor, "blocks levels"]:
    """Use the weights themselves as levels in blocks with no more different weights than levels."""
    rank = torch.nn.functional.pad((blocks.values.diff(dim=-1) > 0).long(), (1, 0)).cumsum(-1)
    own = blocks.values[:, -1:].repeat(1, levels.shape[1])
    own.scatter_(-1, rank.clamp(max=levels.shape[1] - 1), blocks.values)
    return torch.where(rank[:, -1:] < levels.shape[1], own, levels)
