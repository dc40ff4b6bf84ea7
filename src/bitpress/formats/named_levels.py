"""The fixed level tables that have names: what each code of them stands for, and where it comes from.

nf4 nf3 nf2   quantiles of a normal distribution, one half with a level more      Dettmers et al. 2023, "QLoRA"
binary        -1, 1                                                               the sign, times the mean magnitude
ternary       -1, 0, 1 by codes 0, 1, 2                                           Ma et al. 2024 (mean), P165 (median)
bipolarN      the odd numbers from -(2^N - 1) to 2^N - 1: no zero, no unused code
"""

import math
from statistics import NormalDist

__all__ = ["bipolar", "normal_float"]


def normal_float(bits: int) -> tuple[float, ...]:
    """Give the normal-float levels of this width, rising from -1 to 1 with an exact 0.

    The halves are evenly spaced quantiles: 2^(bits-1) of them below zero and one more above, each half scaled to end at 1. The
    outermost quantile is the mean of two rules, 1 - 1/(2 * 2^bits) and 1 - 1/(2 * (2^bits - 1)), as in the published 4-bit table.
    """
    count = 1 << bits
    offset = 0.5 * ((1 - 1 / (2 * count)) + (1 - 1 / (2 * (count - 1))))
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / (count // 2)) for i in range(count // 2)]
    below = [-quantile(offset + (0.5 - offset) * i / (count // 2 - 1)) for i in range(count // 2 - 1)]
    top = max(above)
    return tuple(value / top for value in sorted([*below, 0.0, *above]))


def bipolar(bits: int) -> tuple[float, ...]:
    """Give the odd levels: code c stands for 2 c - (2^bits - 1)."""
    top = (1 << bits) - 1
    assert math.log2(top + 1) == bits
    return tuple(float(2 * code - top) for code in range(top + 1))
