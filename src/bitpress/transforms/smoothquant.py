"""SmoothQuant: move the outliers of inputs into the weights, channel by channel, so that both round well.

Source   Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (P283), and its public
         code (`smoothquant/smooth.py`, `calibration.py`).
Differs  wherever an earlier layer can take the division, also before the output and down projections, where the code smooths what stands
         behind norms. Inputs made by one producer channel share a factor. Factors are centred on 1, which changes no rounding whose scale
         follows its values.
Needs    max_abs [in] float32.      Cost  O(out * in).
Update   s = max |x|^alpha / max |w|^(1 - alpha)  by channel, over all weights that share the input;  x / s,  w * s
Fails    CalibrationError when no token reached the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.transforms.sites import Sites
from bitpress.transforms.smoothing import bounded, column_sizes, input_sizes, power
from bitpress.transforms.transform import InputStats

__all__ = ["SmoothQuant"]


@dataclass(frozen=True)
class SmoothQuant:
    """`alpha` is the share of the difficulty that the weights take. `run_time`: see `ScaleSearch`."""

    alpha: float = 0.5
    run_time: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "move outliers of inputs into the weights, by the largest magnitudes of channels"
    paper: ClassVar[str] = "P283"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha}: it is between 0 and 1.")

    def plan(
        self,
        weights: Sequence[Float[torch.Tensor, "_out in"]],
        stats: InputStats,
        fmt: Format,
        channel_of: Int[torch.Tensor, " in"] | None = None,
        inputs: Format | None = None,
        producer: Float[torch.Tensor, " in"] | None = None,
    ) -> Float[torch.Tensor, " in"]:
        """Choose the factor of every input channel; see `ScaleSearch`."""
        columns = column_sizes(weights, channel_of, "smoothquant")
        sizes = input_sizes(stats.max_abs, stats.tokens, channel_of, "smoothquant", "max_abs")
        return power(bounded(sizes), bounded(columns), self.alpha)
