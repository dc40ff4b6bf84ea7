"""Gaussian mixture: the levels of a block are the means of a mixture of Gaussians fitted to it, one of them exactly zero.

Source   Dong et al. 2021, "Finding the Task-Optimal Low-Bit Sub-Distribution in Deep Neural Networks" (DGMS), and its public code:
         means, shares and widths start as those of k-means; the mean nearest to zero is fixed at zero; the share of a component in a
         weight is softmax(posterior / 0.01). A layer has one mixture there: the block `tensor`.
Differs  after training the paper's mixture follows the loss of the task; here, without training, it is fitted to the weights alone by
         expectation and maximization with those sharpened posteriors. A weight takes the nearest mean instead of the likeliest one,
         so no shares and widths are stored. A block of more than 256 weights is fitted by the means of 256 runs of its sorted
         weights.
Needs    nothing; importance counts as that many weights.
Cost     O(min(n, 256) * 2^bits) a step and block, and 2 bytes times 2^bits a block.

    w_hat = levels[code]         levels rise; float16; one of them 0
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.block_levels import SortedBlocks, level_of, nearest_sorted
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.grids.kmeans import cluster

__all__ = ["GaussianMixture"]

STEPS = 10
TEMPERATURE = 0.01
RUNS = 256
# Components times runs in one step: 32 MB in float32.
TOGETHER = 1 << 23


@dataclass(frozen=True)
class GaussianMixture:
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"{self.name}: a table of levels needs 1 to 8 bits.")

    @property
    def name(self) -> str:
        return f"gmm{self.bits}"

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
        """Fit a mixture to every block; the levels of a block of zeros are zeros."""
        size = max(TOGETHER // (min(blocks.shape[1], RUNS) * self.num_codes), 1)
        weights = [None] * len(blocks.split(size)) if importance is None else importance.expand(blocks.shape).split(size)
        pairs = zip(blocks.split(size), weights, strict=True)
        return {"levels": torch.cat([_means(SortedBlocks.of(b, w), self.num_codes) for b, w in pairs])[:, None]}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        return nearest_sorted(values, params["levels"], self.bits)

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        return level_of(codes, params["levels"])

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a level."""


def _means(blocks: SortedBlocks, count: int) -> Float[torch.Tensor, "blocks levels"]:
    points, mass = _runs(blocks)
    means = cluster(blocks, count)
    zero = torch.zeros_like(means, dtype=torch.bool).scatter_(-1, means.abs().argmin(-1, keepdim=True), True)
    means = means.masked_fill(zero, 0.0)
    belonging = torch.nn.functional.one_hot(nearest_sorted(points, means[:, None], 8).long(), count).float()
    # A component of a single value would become a spike of zero width, so the least width is a thousandth of the block's spread.
    spread = ((points.square() * mass).sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)).sqrt()
    narrowest = (spread * 1e-3).clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(STEPS + 1):
        part = belonging * mass[..., None]
        total = part.sum(1)
        if step > 0:
            moved = (part * points[..., None]).sum(1) / total.clamp(min=torch.finfo(torch.float32).tiny)
            means = torch.where((total > 0) & ~zero, moved, means)
        if step == STEPS:
            break
        apart = points[..., None] - means[:, None]
        width = ((part * apart.square()).sum(1) / total.clamp(min=torch.finfo(torch.float32).tiny)).sqrt().maximum(narrowest)
        share = total / total.sum(-1, keepdim=True)
        likelihood = (share / width).log()[:, None] - 0.5 * (apart / width[:, None]).square()
        belonging = torch.softmax(torch.softmax(likelihood, dim=-1) / TEMPERATURE, dim=-1)
    return means.sort(dim=-1).values


def _runs(blocks: SortedBlocks) -> tuple[Float[torch.Tensor, "blocks runs"], Float[torch.Tensor, "blocks runs"]]:
    """Return the means of runs of the sorted weights, and their total weights, 1 per weight on average."""
    # Half the runs follow the number of weights and half the cube root of their density, so that the few extreme weights stay separate.
    edges = blocks.edges(RUNS, 0.5)
    mass = blocks.importance.gather(-1, edges).diff(dim=-1)
    mean = blocks.moment.gather(-1, edges).diff(dim=-1) / mass.clamp(min=torch.finfo(torch.float64).tiny)
    points = torch.where(mass > 0, mean, blocks.values.gather(-1, edges[:, :-1]).double())
    return points.float(), (mass / blocks.importance[:, -1:] * blocks.values.shape[1]).float()
