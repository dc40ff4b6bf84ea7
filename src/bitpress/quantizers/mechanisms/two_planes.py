"""Two planes of digits with a scale each, from the weight alone: digits and scales alternate, each optimal for the other.

    w_hat = a d_1 + b d_2          digits d_1, d_2 weight by weight, scales a, b for every block

DB-LLM and PTQTP share this loop; their starts differ. Blocks are sorted once, so the nearest sum of each weight is a look-up.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float

from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.formats.grids.block_levels import SortedBlocks
from bitpress.formats.grids.planes import Planes
from bitpress.quantizers.quantizer import Outcome

__all__ = ["best_planes", "by_block", "pairs_of", "ridge_scales", "settle"]

# Scales that change by less than this share have converged; float16 resolves 2^-11.
SETTLED = 1e-4


def best_planes(
    w: Float[torch.Tensor, "out in"],
    fmt: Format,
    starts: Iterable[Float[torch.Tensor, "blocks 2"]],
    steps: int,
    condition: float,
) -> Outcome:
    """Run from every start; every block gets the nearest of the results and of the format's own fit.

    The figure `improved` is the share of blocks for which a result is nearer than that fit.
    """
    fitted = fmt.fit(w)["scale"]
    blocks = SortedBlocks.of(by_block(w, fmt))
    pairs = pairs_of(fmt).to(w.device)
    best = fitted.reshape(-1, 2)
    smallest = first = _look_up(blocks, pairs, best)[0]
    for start in starts:
        scale, error = settle(blocks, pairs, start, steps, condition)
        better = error < smallest
        best, smallest = torch.where(better, scale, best), torch.where(better, error, smallest)
    params = fmt.stored({"scale": best.view(fitted.shape)})
    weight = CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))
    return Outcome(weight, figures={"improved": float((smallest < first).float().mean())})


def settle(
    blocks: SortedBlocks,
    pairs: Float[torch.Tensor, "codes 2"],
    scale: Float[torch.Tensor, "blocks 2"],
    steps: int,
    condition: float,
) -> tuple[Float[torch.Tensor, "blocks 2"], Float[torch.Tensor, "blocks 1"]]:
    """Alternate digits and scales until the scales converge; return the best scales and their error."""
    best, smallest = scale, torch.full_like(blocks.square[:, :1], math.inf)
    for _ in range(steps):
        error, count, moment = _look_up(blocks, pairs, scale)
        better = error < smallest
        best, smallest = torch.where(better, scale, best), torch.where(better, error, smallest)
        moved = ridge_scales(count, moment, pairs, condition)
        if torch.allclose(moved, scale, rtol=SETTLED, atol=0.0):
            break
        scale = moved
    return best, smallest


def ridge_scales(
    count: Float[torch.Tensor, "blocks codes"],
    moment: Float[torch.Tensor, "blocks codes"],
    pairs: Float[torch.Tensor, "codes 2"],
    condition: float,
) -> Float[torch.Tensor, "blocks 2"]:
    """Return the best scales by ridge regression, from the count and the sum of the weights of each pair of digits.

    The ridge is the smallest that keeps the condition number of the normal equations at `condition`; zero if the planes differ enough.
    """
    first, second = pairs.double().unbind(1)
    aa, ab, bb = count @ first.square(), count @ (first * second), count @ second.square()
    aw, bw = moment @ first, moment @ second
    middle, spread = (aa + bb) / 2, (((aa - bb) / 2).square() + ab.square()).sqrt()
    ridge = ((middle + spread - condition * (middle - spread)) / (condition - 1)).clamp(min=0.0)
    ridge = torch.where(middle > 0, ridge, 1.0)
    aa, bb = aa + ridge, bb + ridge
    scale = torch.stack([bb * aw - ab * bw, aa * bw - ab * aw], 1) / (aa * bb - ab.square())[:, None]
    # Digits of both signs absorb a scale's sign; a plane of one sign cannot use a negative scale.
    mirrored = (pairs > 0).any(0) & (pairs < 0).any(0)
    return torch.where(mirrored, scale.abs(), scale.clamp(min=0.0)).float()


def pairs_of(fmt: Format) -> Float[torch.Tensor, "codes 2"]:
    """Return the two digits of every code of a two-plane format."""
    assert isinstance(fmt.grid, Planes)
    first, second = fmt.grid.digits
    return torch.tensor([(a, b) for b in second for a in first], dtype=torch.float32)


def by_block(w: Float[torch.Tensor, "out in"], fmt: Format) -> Float[torch.Tensor, "blocks n"]:
    """Return the weights of every block, blocks in the order of their parameters."""
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]))
    tiles = w.float().reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols)
    return tiles.transpose(1, 2).reshape(-1, rows * cols)


def _look_up(
    blocks: SortedBlocks, pairs: Float[torch.Tensor, "codes 2"], scale: Float[torch.Tensor, "blocks 2"]
) -> tuple[Float[torch.Tensor, "blocks 1"], Float[torch.Tensor, "blocks codes"], Float[torch.Tensor, "blocks codes"]]:
    """Assign every weight to its nearest sum; return the squared error, and count and sum of the weights of every pair."""
    sums = scale[:, :1] * pairs[:, 0] + scale[:, 1:] * pairs[:, 1]
    rising, order = sums.sort(dim=-1, stable=True)
    cells = blocks.cells(rising)
    empty = torch.zeros_like(cells.importance)
    count, moment = empty.scatter(-1, order, cells.importance), empty.scatter(-1, order, cells.moment)
    return blocks.error(rising, cells), count, moment
