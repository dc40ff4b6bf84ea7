"""Power functions: integers raised to an exponent chosen per block, from evenly spaced to dense around zero.

    w_hat = sign(q) * (|q| / 2^(bits-1))^p * scale          q = code - 2^(bits-1)

    powN      p = EXPONENTS[which], which of 3 bits       1, 1.25 .. 2.75
    nupesN    p = WIDE[which], which of 4 bits            1, 1.25 .. 4.75

Source   Yvinec et al. 2023, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search": weights are quantized evenly
         after sign(w) |w|^a, the maps that preserve products; here p = 1/a.
Differs  a is searched per block (with `tensor`, per layer) in a list of 8 or 16 by the squared error of the weights, where the paper
         learns it. The nearest level is taken in w, not in sign(w) |w|^a. Products of powers are not used: codes are decoded before
         they are multiplied.
Cost     fit tries the whole list.

The first exponent is 1, which is intN.

    >>> [round(1 / p, 2) for p in EXPONENTS]
    [1.0, 0.8, 0.67, 0.57, 0.5, 0.44, 0.4, 0.36]
"""

import math

from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.mixture import Mixture

__all__ = ["EXPONENTS", "WIDE", "power"]

# Nine in ten blocks of 64 Gaussian weights take one of the first three at 4 bits; heavy tails take the others.
EXPONENTS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75)
# A whole weight with heavy tails wants 3 at 4 to 8 bits.
WIDE = tuple(1 + i / 4 for i in range(16))


def power(bits: int, name: str, exponents: tuple[float, ...]) -> Mixture:
    """Return the grid of `bits` bits whose blocks choose one of the exponents."""
    half = 1 << (bits - 1)
    tables = (Levels(name, tuple(math.copysign((abs(q) / half) ** p, q) for q in range(-half, half))) for p in exponents)
    return Mixture(name, tuple(tables))
