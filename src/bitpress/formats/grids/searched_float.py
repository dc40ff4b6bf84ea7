"""Searched floats: every block picks its number of exponent bits.

Source   Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers": the exponent bits and the clipping range are searched
         together; a real-valued exponent bias is a scale.
Differs  the exponent bits are chosen per block and by the squared error of the weights, where the paper uses a layer's output.
         The clipping range is `Format.fit`'s `shrink`, searched as for every other grid. Every code is a number:
         no infinities and no NaN at 8 bits.

    fp4s    e1m2 e2m1 e3m0
    fp6s    e1m4 e2m3 e3m2 e4m1
    fp8s    e2m5 e3m4 e4m3 e5m2

e1mY is evenly spaced: the integers of sign and magnitude. All tables are scaled by a power of two to end between 1 and 2, so that
their scales have the same range.
"""

import math

from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.minifloat import minifloat_levels
from bitpress.formats.grids.mixture import Mixture

__all__ = ["searched_float"]

# By bits: the exponent bits to choose from. A mixture needs a power of two of tables, so with three the middle one is repeated.
_EXPONENT_BITS: dict[int, tuple[int, ...]] = {4: (1, 2, 3, 2), 6: (1, 2, 3, 4), 8: (2, 3, 4, 5)}


def searched_float(bits: int) -> Mixture:
    """Return the grid of 4, 6 or 8 bits."""
    name = f"fp{bits}s"
    return Mixture(name, tuple(Levels(name, _near_one(minifloat_levels(x, bits - 1 - x))) for x in _EXPONENT_BITS[bits]))


def _near_one(levels: tuple[float, ...]) -> tuple[float, ...]:
    exponent = math.frexp(max(levels))[1] - 1
    return tuple(math.ldexp(level, -exponent) for level in levels)
