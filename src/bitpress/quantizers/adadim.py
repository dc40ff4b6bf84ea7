"""AdaDim: groups along the inputs or along the outputs, whichever gives the smaller error of the layer's output.

Source   Heo et al. 2023, "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language
         Models"; on rounding and on GPTQ as in the authors' public code (`rtn_ada.py`, `gptq_ada.py`).
Differs  the error is the layer's own output error, exact through the gram, where the code runs the attention or the MLP on samples;
         with GPTQ both directions are rounded in full, where the code decides by plain rounding.
Needs    gram [in, in] float32.     Cost  twice that of the method it rounds with.
Update   blocks [r, c] or [c, r], by  argmin  tr((w - w_hat) gram (w - w_hat)')
Fails    as the method it rounds with. If the turned block does not divide the weight, the block of the format is used.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import Block, Format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantizer import Outcome, Quantizer, output_errors
from bitpress.quantizers.rtn import RTN

__all__ = ["AdaDim"]


@dataclass(frozen=True)
class AdaDim(Quantizer):
    rounding: Literal["gptq", "nearest"] = "gptq"

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "groups along inputs or outputs, by the error of the layer's output"
    paper: ClassVar[str] = "P254"
    bits: ClassVar[tuple[float, float]] = (3, 4)

    def __post_init__(self) -> None:
        if self.rounding not in ("gptq", "nearest"):
            raise UsageError(f"rounding={self.rounding!r}: must be 'gptq' or 'nearest'.")

    @property
    def keeps_format(self) -> bool:
        return False

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("adadim")
        w = w.float()
        inner = GPTQ() if self.rounding == "gptq" else RTN()
        outcomes = [inner.quantize(w, stats, way) for way in ways(fmt, (w.shape[0], w.shape[1]))]
        errors = output_errors(w, [o.weight.dequantize() for o in outcomes], Stats(1, gram))
        best = min(range(len(errors)), key=errors.__getitem__)
        return Outcome(outcomes[best].weight, outcomes[best].fallbacks, outcomes[best].figures | {"turned": float(best)})


def ways(fmt: Format, shape: tuple[int, int]) -> list[Format]:
    """Return the format, and the same format with its block turned if that differs and divides the weight."""
    rows, cols = fmt.block.resolve(shape, fmt.grid.span)
    if fmt.block.rows == "all":
        return [fmt]
    # By its name a block of one whole row turns into one of a whole column.
    turned = Block(shape[0] if fmt.block.cols == "all" else cols, rows)
    try:
        size = turned.resolve(shape, fmt.grid.span)
    except FormatError:
        return [fmt]
    return [fmt] if size == (rows, cols) else [fmt, Format(fmt.grid, turned, fmt.scale, fmt.layout)]
