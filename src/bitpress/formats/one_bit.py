"""OneBit: the signs of a weight, times a factor for every output and one for every input.

Source   Xu et al. 2024, "OneBit: Towards Extremely Low-bit Large Language Models": the weight is sign(w) times the best matrix of
         rank one of |w|, by a singular value decomposition or a non-negative factorization of rank one (its public code).
Differs  the two agree, since the first singular vectors of a non-negative matrix are non-negative. They are computed by alternating
         least squares, which also allows for importance. The paper trains all three parts afterwards.
Needs    importance per input or per weight, or nothing.
Cost     O(out * in) a step. 1 bit a weight and 4 bytes for every output and every input: 1.016 bits for 4096 x 4096 (1.008 in the
         paper, whose factors are float16). The signs are `binary-tensor` with the scale 1: 2 bytes more.
Update   a_i = sum_j h_ij |w_ij| b_j / sum_j h_ij b_j^2,  b_j = sum_i h_ij |w_ij| a_i / sum_i h_ij a_i^2
"""

import torch
from jaxtyping import Float

from bitpress.errors import NumericsError
from bitpress.formats.maps.map import Scale
from bitpress.formats.table import parse_format
from bitpress.formats.terms.packed import Packed
from bitpress.formats.weight import CompressedWeight

__all__ = ["one_bit"]

# Magnitudes are all positive, so the first singular value is far above the second: a few steps are enough.
STEPS = 50


def one_bit(w: Float[torch.Tensor, "out in"], importance: Float[torch.Tensor, "*rows in"] | None = None) -> CompressedWeight:
    """Return the signs of `w` with an input and an output scale map. Raises NumericsError when the weight is not finite."""
    if not bool(torch.isfinite(w).all()):
        raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
    out, inner = factors(w.float().abs(), None if importance is None else importance.float().expand(w.shape))
    fmt = parse_format("binary-tensor")
    params = {"scale": torch.ones(1, 1, device=w.device)}
    return CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),), Scale(inner), Scale(out))


def factors(
    magnitude: Float[torch.Tensor, "out in"], importance: Float[torch.Tensor, "out in"] | None = None
) -> tuple[Float[torch.Tensor, " out"], Float[torch.Tensor, " in"]]:
    """Return the vectors of equal length whose outer product is nearest to `magnitude`, weighted by importance."""
    weighted = magnitude if importance is None else magnitude * importance
    inner = magnitude.mean(0)
    out = torch.zeros_like(magnitude[:, 0])
    for _ in range(STEPS):
        before = out
        spread = inner.square()
        out = _divide(weighted @ inner, spread.sum() if importance is None else importance @ spread)
        spread = out.square()
        inner = _divide(weighted.T @ out, spread.sum() if importance is None else importance.T @ spread)
        if torch.allclose(out, before, rtol=1e-6, atol=0.0):
            break
    ratio = (_divide(inner.norm(), out.norm())).sqrt()
    return out * ratio, _divide(inner, ratio)


def _divide(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Divide; 0 / 0 is 0."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
