"""BitStack: a weight as a stack of terms (signs times low-rank magnitudes), each approximating the residual of the earlier ones.

The term is `formats.terms.sign_low_rank`, which names the source. A prefix of the terms is the same weight in fewer bits.
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
    """Return `count` terms of about one bit per weight each.

    Inputs with a large `scale` (in the paper, their size in calibration) are approximated more closely: the terms
    approximate `w * scale`, and the input map is 1 / scale. Raises FormatError for a count below 1 or a scale that is not positive.
    """
    if count < 1:
        raise FormatError(f"a stack of {count} terms was asked for; at least 1 is needed.")
    if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FormatError("the scale of an input is not positive.")
    rest = w.float() if scale is None else w.float() * scale.float()
    if not bool(torch.isfinite(rest).all()):
        raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
    terms: list[SignLowRank] = []
    for _ in range(count):
        terms.append(sign_low_rank(rest, rank, dtype))
        rest = rest - terms[-1].dequantize()
    return CompressedWeight(tuple(terms), None if scale is None else Scale(1 / scale.float()))


def shorten(weight: CompressedWeight, count: int) -> CompressedWeight:
    """Return a stacked weight with its first `count` terms only, sharing memory. Raises FormatError if it has no such prefix."""
    if not all(isinstance(term, SignLowRank) for term in weight.terms):
        raise FormatError("only a stack of signs and magnitudes can be cut to fewer terms; this weight has other terms.")
    if not 1 <= count <= len(weight.terms):
        raise FormatError(f"cannot cut a stack of {len(weight.terms)} terms to {count}; use 1 to {len(weight.terms)}.")
    return CompressedWeight(weight.terms[:count], weight.input_map, weight.output_map)
