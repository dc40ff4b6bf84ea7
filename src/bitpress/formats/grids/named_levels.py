"""The named level tables: the meaning of each code, and its source.

nf4 nf3 nf2   quantiles of a normal distribution, one more on one side            Dettmers et al. 2023, "QLoRA"
binary        -1, 1                                                               the sign, times the mean magnitude
ternary       -1, 0, 1 by codes 0, 1, 2                                           BitNet b1.58 (mean), BitNet b1.58 Reloaded (median)
fp4bnb        a 4-bit float with unordered codes, divided by 12                   bitsandbytes, its table "fp4"
iq4nl         integers along a cubic, by codes from the smallest                    llama.cpp, IQ4_NL and IQ4_XS
balancedN     the integers from -2^(N-1) to 2^(N-1): a level more than N bits have  ABQ-LLM's bit balance (symmetric; 2 bits there)
bipolarN      the odd numbers from -(2^N - 1) to 2^N - 1: no zero, no unused code
"""

import math
from statistics import NormalDist

__all__ = ["IQ4NL", "balanced", "bipolar", "fp4_bitsandbytes", "normal_float"]

# No zero: the smallest magnitude is 1, and llama.cpp's scales multiply these integers.
IQ4NL = (*(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0), *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0))

# The float32 numbers of bitsandbytes' table "nf4", as every checkpoint in this format uses them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def normal_float(bits: int) -> tuple[float, ...]:
    """Return the normal-float levels of `bits` bits, rising from -1 to 1 with an exact 0.

    The halves are evenly spaced quantiles: 2^(bits-1) of them below zero and one more above, each half scaled to end at 1. The
    outermost quantile is the mean of two rules, 1 - 1/(2 * 2^bits) and 1 - 1/(2 * (2^bits - 1)), as in the published 4-bit table.
    That table was computed in float32, 8 units of the last place away at most: the 4 bits are the published ones.
    """
    if bits == 4:
        return _NF4
    count = 1 << bits
    offset = 0.5 * ((1 - 1 / (2 * count)) + (1 - 1 / (2 * (count - 1))))
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / (count // 2)) for i in range(count // 2)]
    below = [-quantile(offset + (0.5 - offset) * i / (count // 2 - 1)) for i in range(count // 2 - 1)]
    top = max(above)
    return tuple(value / top for value in sorted([*below, 0.0, *above]))


def bipolar(bits: int) -> tuple[float, ...]:
    """Return the odd levels: code c stands for 2 c - (2^bits - 1)."""
    top = (1 << bits) - 1
    assert math.log2(top + 1) == bits
    return tuple(float(2 * code - top) for code in range(top + 1))


def balanced(bits: int) -> tuple[float, ...]:
    """Return the whole numbers from -2^(bits - 1) to 2^(bits - 1), rising: 2^bits + 1 levels."""
    most = 1 << (bits - 1)
    return tuple(float(level) for level in range(-most, most + 1))


def fp4_bitsandbytes() -> tuple[float, ...]:
    """Return the levels of bitsandbytes' fp4 by its codes: a sign bit above three bits that stand for these twelfths.

    With `g64-fp32` the codes equal those of its CUDA kernels, except within a millionth of a midpoint, where the kernels compare with
    rounded constants. Its CPU code exchanges the two zeros: 8 above zero, 0 below.
    """
    magnitudes = [twelfths / 12 for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
    return (*magnitudes, *(-m for m in magnitudes))
