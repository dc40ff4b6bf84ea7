"""BitStack: a weight as a stack of signs times low-rank magnitudes, each made of what those before leave over.

The term is `formats.terms.sign_low_rank`, where the source stands. A prefix of the terms is the same weight in fewer bits.
"""

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.maps.map import Scale
from bitpress.formats.terms.sign_low_rank import SignLowRank, sign_low_rank
from bitpress.formats.weight import CompressedWeight

__all__ = ["bit_stack", "shorten"]


def bit_stack(
    w: Float[torch.Tensor, "out in"],
    count: int,
    rank: int = 16,
    scale: Float[torch.Tensor, " in"] | None = None,
    dtype: str = "fp16",
) -> CompressedWeight:
    """Return `count` terms of about one bit a weight each.

    Inputs with a large `scale` (in the paper, how large calibration saw them) are approximated more closely: the terms
    are those of `w * scale`, behind an input map of 1 / scale. Raises FormatError for a count below 1 or a scale that is not positive.
    """
    if count < 1:
        raise FormatError(f"a stack has {count} terms; it needs at least 1.")
    if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FormatError("a scale of an input is not a positive number.")
    rest = w.float() if scale is None else w.float() * scale.float()
    if not bool(torch.isfinite(rest).all()):
        raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
    terms: list[SignLowRank] = []
    for _ in range(count):
        terms.append(sign_low_rank(rest, rank, dtype))
        rest = rest - terms[-1].dequantize()
    return CompressedWeight(tuple(terms), None if scale is None else Scale(1 / scale.float()))


def shorten(weight: CompressedWeight, count: int) -> CompressedWeight:
    """Return a stacked weight by its first `count` terms, sharing memory. Raises FormatError when it has no such prefix."""
    if not all(isinstance(term, SignLowRank) for term in weight.terms):
        raise FormatError("only a weight that is a stack of signs and magnitudes can be cut; this one has other terms.")
    if not 1 <= count <= len(weight.terms):
        raise FormatError(f"{count} terms are not some of the stack's {len(weight.terms)}.")
    return CompressedWeight(weight.terms[:count], weight.input_map, weight.output_map)
