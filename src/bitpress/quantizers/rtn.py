"""RTN: round every weight to its nearest level.

Source   the yardstick of every paper of the field; clipping search by squared error as in OMSE-style calibration.
Differs  clip="mse" tries `steps` ranges from the full one down to `smallest` of it, block by block. Scales in coarse stores
         are rounded to whichever side has less error (docs/formats.md, scale stores); MX without a search is OCP's floor rule.
Needs    nothing.                   Cost  O(out * in * steps) time.
Update   codes = argmin over levels of |w - level|
Fails    NumericsError when a weight is not finite.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.quantizers.quantizer import Outcome, Quantizer

__all__ = ["RTN", "shrink_ratios"]


@dataclass(frozen=True)
class RTN(Quantizer):
    clip: Literal["minmax", "mse"] = "minmax"
    steps: int = 20
    smallest: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "round to the nearest level; min-max or squared-error clipping"
    paper: ClassVar[str] = "yardstick: rounding"
    bits: ClassVar[tuple[float, float]] = (4, 8)

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        params = fmt.fit(w, shrink=shrink_ratios(self.clip, self.steps, self.smallest))
        return Outcome(CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),)))


def shrink_ratios(clip: str, steps: int, smallest: float) -> tuple[float, ...]:
    """Return the fractions of a block's range that a clipping search tries, the full range first."""
    if clip not in ("minmax", "mse"):
        raise UsageError(f"clip={clip!r}: must be 'minmax' or 'mse'.")
    if not 2 <= steps <= 10_000 or not 0 < smallest < 1:
        raise UsageError(f"clip=mse needs steps from 2 to 10000 and 0 < smallest < 1, got steps={steps}, smallest={smallest}.")
    if clip == "minmax":
        return (1.0,)
    return tuple(1.0 - (1.0 - smallest) * i / (steps - 1) for i in range(steps))
