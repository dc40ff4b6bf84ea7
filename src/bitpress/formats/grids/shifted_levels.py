"""Shifted levels: uneven levels that every block takes as they are, shifted, mirrored, or both.

    w_hat = (levels[code] + shift) * scale          which = 0, and 1 with the shift
            -(levels[code] + shift) * scale         which = 2, and 3 with the shift

Source   ik_llama.cpp, the types IQ2_K, IQ3_K and IQ4_K (its tables `iq2nl_values`, `iq3nl_values`, `iq4k_values`): integers along a
         cubic for blocks of 16 weights with a bit for the shift, under scales of a few bits within blocks of 256.
Differs  scales are positive here and the sign of the scale is the second bit of `which`, of the same size. The larger unit that scales
         share is the row and its factor a float32, so that any width with whole blocks is served. All four tables are searched with all
         scales of the search as they are stored, where the code refines each scale by least squares and rounds it afterwards.
Needs    the weight; importance weighs the choice.

A block has one large weight on one side more often than on both, and no zero is needed if the smallest magnitudes of the four tables
lie at different distances from it.

    >>> IQ2K, [level + SHIFTS[2] for level in IQ2K]
    ((-31.0, -13.0, 1.0, 17.0), [-26.0, -8.0, 6.0, 22.0])
"""

from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.mixture import Mixture
from bitpress.formats.grids.named_levels import IQ4NL

__all__ = ["IQ2K", "IQ3K", "SHIFTS", "shifted_levels"]

IQ2K = (-31.0, -13.0, 1.0, 17.0)
IQ3K = (-63.0, -40.0, -23.0, -10.0, 1.0, 13.0, 28.0, 47.0)
_LEVELS: dict[int, tuple[float, ...]] = {2: IQ2K, 3: IQ3K, 4: IQ4NL}
# By bits.
SHIFTS: dict[int, float] = {2: 5.0, 3: 4.0, 4: 4.0}
# Bits of a scale beside its sign, as in the source but for IQ4_K, which has five.
_STORES: dict[int, str] = {2: "s4", 3: "s4", 4: "s6"}


def shifted_levels(bits: int) -> Mixture:
    """Return the grid of 2, 3 or 4 bits."""
    levels, shifted = _LEVELS[bits], tuple(level + SHIFTS[bits] for level in _LEVELS[bits])
    mirrored = (tuple(-level for level in table) for table in (levels, shifted))
    tables = (levels, shifted, *mirrored)
    return Mixture(f"iq{bits}k", tuple(Levels(f"iq{bits}k", table, usual_scale=_STORES[bits]) for table in tables))
