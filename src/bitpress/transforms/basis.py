"""BasisChange, the protocol of changes of basis: hyper-parameters in the constructor, a weight and its input's statistics in `plan`.

    y = w x = T_out w' T_in x,        w' = T_out^-1 w T_in^-1

The quantizer sees w' and the statistics of T_in x (`Stats.mapped`); the maps are stored beside its terms. Random maps are drawn from
a setting `seed` and the width alone, so that weights that share an input share its map.
"""

import zlib
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float

from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Map, chain
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["BasisChange", "Maps", "generator_of", "into_basis", "with_maps"]

Maps = tuple[Map | None, Map | None]


class BasisChange(Protocol):
    """One paper's way to choose the maps of a weight.

    needs   names of the statistics that `plan` reads
    sites   which maps it may choose, of a layer's input or output; they stay online
    paper   row of the paper in the catalogue of methods
    """

    needs: ClassVar[frozenset[str]]
    sites: ClassVar[Sites]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        """Choose the input map and the output map, None for no change. Raises CalibrationError, FormatError, NumericsError."""
        ...


def into_basis(w: Float[torch.Tensor, "out in"], maps: Maps) -> Float[torch.Tensor, "out in"]:
    """Return w' = T_out^-1 w T_in^-1."""
    input_map, output_map = maps
    if input_map is not None:
        w = input_map.dual().apply(w)
    return w if output_map is None else output_map.dual().apply_transposed(w.T).T.contiguous()


def with_maps(weight: CompressedWeight, maps: Maps) -> CompressedWeight:
    """Put the maps around a weight that was quantized in their basis."""
    input_map, output_map = maps
    return CompressedWeight(weight.terms, chain(input_map, weight.input_map), chain(weight.output_map, output_map))


def generator_of(seed: int, side: Literal["input", "output", "residual", "value", "query/key"], width: int) -> torch.Generator:
    """Return the generator of the random map of one side; it is the same for every weight of this width."""
    if type(seed) is not int or not 0 <= seed < 1 << 24:
        raise UsageError(f"seed={seed!r}: it is a whole number from 0 to {(1 << 24) - 1}.")
    # torch's generator uses 32 bits of a seed, so all three values are mixed into 32 bits.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {side} {width}".encode()))
