"""Lossless formats: named like number formats, but without a grid, and not used by quantizers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.errors import FormatError
from bitpress.formats.format import Format
from bitpress.formats.table import parse_format, spell_format
from bitpress.formats.terms.dfloat11 import DFloat11, dfloat11

__all__ = ["LOSSLESS", "AnyFormat", "Lossless", "find_format", "read_format"]


@dataclass(frozen=True)
class Lossless:
    """bfloat16 weights, entropy-coded (`formats.terms.dfloat11`)."""

    name: str
    about: str
    # A usual value, which depends on the weights; SmolLM2 takes 10.67.
    usual_bits: float

    def block_grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Every shape fits."""
        return 1, 1

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Estimate the bytes of a weight."""
        return round(shape[0] * shape[1] * self.usual_bits / 8)

    def encode(self, w: Float[torch.Tensor, "out in"]) -> DFloat11:
        """Encode a weight. Raises FormatError unless all its values are exactly bfloat16."""
        # A bfloat16 is the upper half of a float32. Bits are compared, not values: a NaN differs from itself.
        wide = w.float().contiguous()
        bits = wide.view(torch.int32)
        if bool((bits & 0xFFFF).any()) or not bool(((wide.to(w.dtype) == w) | w.isnan()).all()):
            raise FormatError(
                f"{self.name} keeps bfloat16 weights bit for bit, and these have more digits; choose a number format."
            )
        return dfloat11((bits >> 16).to(torch.int16).view(torch.bfloat16))


LOSSLESS: dict[str, Lossless] = {"dfloat11": Lossless("dfloat11", "bfloat16 bit for bit, exponents entropy-coded", 10.75)}

AnyFormat = Format | Lossless


def find_format(name: str) -> AnyFormat:
    """Read the name of a number format or of a lossless one. Raises UsageError or FormatError."""
    return LOSSLESS[name] if name in LOSSLESS else parse_format(name)


def read_format(name: str) -> AnyFormat:
    """Read a format's name in upper or lower case. Raises UsageError or FormatError."""
    if not name.strip():
        raise FormatError("the name of the number format is empty; use for example int4-g64-zero.")
    return find_format(name.strip().lower() if name.strip().lower() in LOSSLESS else spell_format(name))
