"""Bits layer by layer: choose one option per layer so that the total error is least and the bytes fit a budget.

Source   Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem" (HIGGS): the loss
         rises by a sum over layers, a factor of the layer times the relative squared error of its weight, so the best bits
         solve a knapsack, here by dynamic programming. The caller measures the factors.
Differs  the budget is bytes of whole weights, parameters included, not bits of codes.
Cost     O(layers * options * units) time. A unit is the greatest common divisor of all byte counts if `units` of it hold the budget; the choice
         is then exact. Otherwise it is the budget over `units`, with sizes rounded up: the budget still holds, and at most one unit
         per layer stays unused.
"""

import math
from collections.abc import Sequence

import torch

from bitpress.errors import NumericsError, UsageError

__all__ = ["choose_bits"]


def choose_bits(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, units: int = 1 << 16
) -> tuple[int, ...]:
    """Return the option to take for every layer.

    `errors[layer][option]` is the increase of the loss, `sizes[layer][option]` the bytes. Of equally good choices, the one with fewer
    bytes is returned. Raises UsageError if even the smallest options exceed `budget` bytes.
    """
    if not errors or len(errors) != len(sizes) or any(not e or len(e) != len(s) for e, s in zip(errors, sizes, strict=True)):
        raise UsageError("choose_bits: every layer needs an error and a size for each of its options.")
    if any(not math.isfinite(e) for layer in errors for e in layer):
        raise NumericsError("choose_bits: the error of an option is not finite; leave the option out.")
    smallest = [min(layer) for layer in sizes]
    left = budget - sum(smallest)
    if left < 0:
        raise UsageError(f"choose_bits: the smallest options take {sum(smallest)} bytes, more than the budget of {budget}.")
    extra = [[size - low for size in layer] for layer, low in zip(sizes, smallest, strict=True)]
    left = min(left, sum(max(layer) for layer in extra))
    unit = max(math.gcd(*(e for layer in extra for e in layer)), 1)
    if left // unit > units:
        unit = -(-left // units)
    room = left // unit

    # best[b] is the least error of the layers so far in b units or fewer; taken[layer][b] is the option that gives it.
    best = torch.zeros(room + 1, dtype=torch.float64)
    taken = []
    for own_errors, own_extra in zip(errors, extra, strict=True):
        costs = [-(-e // unit) for e in own_extra]
        total = torch.full((len(costs), room + 1), math.inf, dtype=torch.float64)
        for option, (error, cost) in enumerate(zip(own_errors, costs, strict=True)):
            if cost <= room:
                total[option, cost:] = best[: room + 1 - cost] + error
        best, option_at = total.min(0)
        taken.append(option_at)
    # Bytes that buy nothing are not spent.
    at = int((best == best[-1]).nonzero()[0])
    chosen = []
    for option_at, own_extra in zip(reversed(taken), reversed(extra), strict=True):
        option = int(option_at[at])
        chosen.append(option)
        at -= -(-own_extra[option] // unit)
    return tuple(reversed(chosen))
