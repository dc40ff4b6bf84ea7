"""BitMoD: 3- and 4-bit floats whose second zero is one more value, chosen per block.

    w_hat = table[which][code] * scale

    bitmod3   code: sign, two bits of magnitude m      0 1 2 4 for m = 0 to 3                          code 4: 3, -3, 6, -6
    bitmod4   code: sign, three bits of magnitude m    0 0.5 1 1.5 2 3 4 6 for m = 0 to 7 (e2m1)       code 8: 5, -5, 8, -8

The code with only the sign bit, otherwise a second zero, is one of four values, chosen by which = 0 to 3.

Source   Chen et al. 2024, "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration", and its public code: the four tables and the
         choice by squared error; the scale is the largest magnitude over the largest level of a table, on either side, so that a
         table whose special value extends the range clips the other side.
Differs  fp4 in the units of e2m1, half of the code's. The scale is fp16 unless the format's name says otherwise.
Needs    the weight; importance weighs the choice.
"""

from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.mixture import Mixture

__all__ = ["bitmod"]

# By bits: the magnitudes of the codes without the sign bit, and the four special values. The first two of those refine the range,
# the others extend it.
_MAGNITUDES: dict[int, tuple[float, ...]] = {3: (0, 1, 2, 4), 4: (0, 0.5, 1, 1.5, 2, 3, 4, 6)}
_SPECIAL: dict[int, tuple[float, ...]] = {3: (3, -3, 6, -6), 4: (5, -5, 8, -8)}


def bitmod(bits: int) -> Mixture:
    """Return the mixture of 3 or 4 bits; codes are a sign bit above the magnitude, and minus zero is the special value."""
    magnitudes = _MAGNITUDES[bits]
    negative = tuple(-value for value in magnitudes[1:])
    tables = (Levels(f"bitmod{bits}", (*magnitudes, special, *negative), "largest") for special in _SPECIAL[bits])
    return Mixture(f"bitmod{bits}", tuple(tables))
