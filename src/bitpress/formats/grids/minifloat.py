"""Minifloats: a sign, x exponent bits, y mantissa bits, 3 to 8 bits in all, with any bias, with or without infinities and NaN.

    code      s eeee mmm                          sign in the highest bit
    value     (-1)^s * 2^(e - bias) * (1 + m / 2^y)     for e > 0
              (-1)^s * 2^(1 - bias) * m / 2^y           for e = 0
    bias      2^(x - 1) - 1, or the one in the name: `e4m3b11`

    specials  finite   every code is a number                                  e2m1, e3m2, e2m3 of OCP MX
              fn       the largest magnitude is NaN, no infinities             e4m3 of OCP (largest 448)
              ieee     the largest exponent is infinity and NaN                e5m2 of OCP; written e4m3i for others

Worked example: e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and their negatives.

    >>> minifloat_levels(2, 1)[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""

import math
from typing import Literal

from bitpress.errors import FormatError

__all__ = ["Specials", "minifloat_levels"]

Specials = Literal["finite", "fn", "ieee"]


def minifloat_levels(
    exponent_bits: int, mantissa_bits: int, bias: int | None = None, specials: Specials = "finite"
) -> tuple[float, ...]:
    """Return the value of every code; NaN for codes that are infinities or not numbers. Raises FormatError."""
    x, y = exponent_bits, mantissa_bits
    if x < 1 or y < 0 or not 3 <= 1 + x + y <= 8:
        raise FormatError(f"e{x}m{y}: a minifloat needs 3 to 8 bits: a sign, 1 or more exponent bits, 0 or more mantissa bits.")
    bias = (1 << (x - 1)) - 1 if bias is None else bias
    if not 0 <= bias <= 64:
        raise FormatError(f"e{x}m{y}b{bias}: a bias is 0 to 64; the block's scale covers other ranges.")
    magnitudes = []
    for e in range(1 << x):
        for m in range(1 << y):
            value = math.ldexp(m if e == 0 else (1 << y) + m, max(e, 1) - bias - y)
            top = e == (1 << x) - 1
            nan = (specials == "ieee" and top) or (specials == "fn" and top and m == (1 << y) - 1)
            magnitudes.append(math.nan if nan else value)
    return (*magnitudes, *(value if math.isnan(value) else -value for value in magnitudes))
