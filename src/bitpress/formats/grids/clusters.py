"""Clusters: weighted k-means, deterministic.

Source   Lloyd 1982, the two alternating steps; Arthur and Vassilvitskii 2007, "k-means++", seeds drawn with weight * distance^2.
Differs  draws are systematic (evenly spaced points on the cumulative weights) instead of random, and a round draws a quarter as many
         seeds as exist: 45 rounds for 65,536 seeds, and no random state. An empty cluster takes the vector with the largest error.
Cost     O(n * count * span) a round, by `formats.grids.nearest`.
"""

import math

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats.grids.nearest import nearest

__all__ = ["cluster", "spread_sample"]

# A squared distance this small relative to the squared vector is rounding error.
ROUNDING = 1e-6
# Clusters have converged when at most one vector in this many changes its cluster in a round.
SETTLED = 1000


def cluster(
    vectors: Float[torch.Tensor, "n span"], weights: Float[torch.Tensor, "n per"], count: int, rounds: int
) -> Float[torch.Tensor, "count span"]:
    """Return `count` words that represent the vectors with a small weighted squared error.

    `weights` has one entry per vector or per number; they weigh the means, not the search, since a reader does not know them. If there
    are fewer vectors than words, the vectors are repeated as words.
    """
    if len(vectors) <= count:
        return vectors[torch.arange(count, device=vectors.device) % len(vectors)].clone()
    words = _seeds(vectors, weights.mean(-1), count)
    before: torch.Tensor | None = None
    for _ in range(rounds):
        codes = nearest(vectors, words)
        if before is not None and int((codes != before).sum()) * SETTLED <= len(codes):
            break
        before = codes
        words = _means(vectors, weights, codes, words)
    return words


def spread_sample(n: int, most: int) -> Int[torch.Tensor, " sample"]:
    """Return at most `most` numbers below n, spread evenly without a period."""
    step = max(round(n * (math.sqrt(5) - 1) / 2), 1)
    while math.gcd(step, n) > 1:
        step += 1
    return torch.arange(min(n, most)) * step % n


def _seeds(vectors: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    squares = vectors.square().sum(-1)
    distance = squares.clone()
    words = vectors[:0]
    while len(words) < count:
        reached = (weights * distance).double().cumsum(0)
        total = float(reached[-1])
        if total <= 0:  # every vector is a word already
            return torch.cat([words, words.new_zeros(count - len(words), vectors.shape[1])])
        draws = min(max(len(words) // 4, 1), count - len(words))
        points = (torch.arange(draws, dtype=torch.float64, device=vectors.device) + 0.5) * (total / draws)
        picked = torch.searchsorted(reached, points).clamp_(max=len(vectors) - 1).unique()
        fresh = vectors[picked]
        words = torch.cat([words, fresh])
        apart = (vectors - fresh[nearest(vectors, fresh)]).square_().sum(-1)
        distance = torch.minimum(distance, torch.where(apart > ROUNDING * squares, apart, 0.0))
        distance[picked] = 0
    return words


def _means(vectors: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros_like(words).index_add_(0, codes, vectors * weights)
    mass = weights.new_zeros(len(words), weights.shape[1]).index_add_(0, codes, weights)
    means = torch.where(mass > 0, sums / mass.clamp(min=torch.finfo(mass.dtype).tiny), words)
    empty = (torch.bincount(codes, minlength=len(words)) == 0).nonzero()[:, 0]
    if len(empty):
        error = ((vectors - words[codes]).square_() * weights).sum(-1)
        means[empty] = vectors[error.topk(len(empty)).indices]
    return means
