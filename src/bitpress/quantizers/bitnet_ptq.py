"""BitNet's rounding, applied after training: -1, 0 or 1 times the mean or the median magnitude.

Source   Nielsen and Schneider-Kamp 2024, "BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks": the median in
         place of the mean magnitude of BitNet b1.58; rounding as in the authors' public layer.
Differs  they train with this rounding in the forward pass; here a trained weight is rounded once, a baseline for ternary methods and
         a start for such training. Any block may have its own scale; theirs has one per weight.
Needs    nothing.                   Cost  O(out * in), a sort of every block for the median.
Update   scale = mean |w| or median |w| of the block;  w_hat = clamp(round(w / scale), -1, 1) * scale
Fails    NumericsError when a weight is not finite. A block whose median is 0 has the scale 0.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import NumericsError, UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["BitNetPTQ"]


@dataclass(frozen=True)
class BitNetPTQ(Quantizer):
    measure: Literal["mean", "median"] = "mean"

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "ternary by the mean or the median magnitude, after training"
    paper: ClassVar[str] = "P165"
    bits: ClassVar[tuple[float, float]] = (1.58, 2)
    serves: ClassVar[tuple[str, ...]] = ("ternary-*", "ternarymed-*")

    def __post_init__(self) -> None:
        if self.measure not in ("mean", "median"):
            raise UsageError(f"measure={self.measure!r}: must be 'mean' or 'median'.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("bitnet_ptq", self.serves, fmt)
        if not bool(torch.isfinite(w).all()):
            raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
        rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]))
        down, across = fmt.block_grid((w.shape[0], w.shape[1]))
        magnitudes = w.float().abs().view(down, rows, across, cols).transpose(1, 2).reshape(down, across, -1)
        scale = magnitudes.mean(-1) if self.measure == "mean" else magnitudes.median(-1).values
        params = fmt.stored({"scale": scale})
        codes = fmt.encode(w, params)
        zeros = float((codes == 1).float().mean())
        return Outcome(CompressedWeight((Packed.pack(fmt, codes, params),)), figures={"zeros": zeros})
