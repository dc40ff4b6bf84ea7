"""The ends of every channel of an input, or those between which its values round with the least squared error.

Both ends move apart from each other, since outliers of a channel lie at one of them: an end at a time, from the whole range inwards to the
channel's median. A range that moves with its values moves its ends, and nothing else.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float

from bitpress.formats import EvenlySpaced, Format

__all__ = ["channel_ends", "clipped_ends"]

# Ends that are tried, as shares of the distance from the median, and how often each side is tried.
SHARES, ROUNDS = 20, 2

Ends = tuple[Float[torch.Tensor, " in"], Float[torch.Tensor, " in"]]


def channel_ends(sample: Float[torch.Tensor, "tokens in"]) -> Ends:
    """Return the least and the largest value of every channel, float32."""
    low, high = torch.aminmax(sample.float(), dim=0)
    return low, high


def clipped_ends(sample: Float[torch.Tensor, "tokens in"], fmt: Format | None) -> Ends:
    """Return the ends between which each channel, alone, has the least squared error in as many even steps as a format has.

    A format whose levels are not even, or none, leaves the whole range.
    """
    x = sample.float()
    low, high = channel_ends(x)
    if fmt is None or not isinstance(fmt.grid, EvenlySpaced):
        return low, high
    middle, steps = x.median(0).values, fmt.grid.num_codes - 1

    def error(ends: Ends) -> Float[torch.Tensor, " in"]:
        step = ((ends[1] - ends[0]) / steps).clamp(min=torch.finfo(torch.float32).tiny)
        clipped = x.clamp(*ends)
        return (((clipped - ends[0]) / step).round() * step + ends[0] - x).square().sum(0)

    best, whole = (low, high), (low, high)
    for side in (0, 1) * ROUNDS:
        best = _moved(best, side, middle, whole[side], error)
    return best


def _moved(
    best: Ends,
    side: int,
    middle: Float[torch.Tensor, " in"],
    whole: Float[torch.Tensor, " in"],
    error: Callable[[Ends], Float[torch.Tensor, " in"]],
) -> Ends:
    """Return the ends with one side where each channel's error is least."""
    least, chosen = error(best), best[side]
    for k in range(SHARES, 0, -1):
        end = middle + (whole - middle) * k / SHARES
        found = error((end, best[1]) if side == 0 else (best[0], end))
        chosen, least = torch.where(found < least, end, chosen), torch.minimum(found, least)
    return (chosen, best[1]) if side == 0 else (best[0], chosen)
