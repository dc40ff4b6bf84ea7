"""SmoothQuant+: balance the inputs' channels against those of the weights, at the strength with the least output error.

Source   Pan et al. 2023, "SmoothQuant+: Accurate and Efficient 4-bit Post-Training WeightQuantization for LLM": the abstract is what could
         be read, and its public repository holds no code; the smoothing is SmoothQuant's.
Differs  the strength is searched for every group of weights that share an input, by the error of their outputs, where the paper has one for
         the model, by the model's loss: a scale search here sees one group of weights and no other. `alpha` sets one strength for all.
         Mean magnitudes of the inputs, not the largest ones. Inputs made by one producer channel share a factor. The search includes no
         smoothing at all.
Needs    gram [in, in], mean_abs [in] float32.      Cost  O(grid * out * in^2) time, O(out * in) memory.
Update   s = mean_abs^alpha / max |w|^(1 - alpha),  alpha = argmin over i / grid of sum over siblings tr(D gram D'),
         D = Q(w * s) / s - w
Fails    CalibrationError when no token reached the weights. With a searched alpha the error is never larger than without smoothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format
from bitpress.transforms.awq_scale import OutputError
from bitpress.transforms.sites import Sites
from bitpress.transforms.smoothing import bounded, column_sizes, input_sizes, least, power
from bitpress.transforms.transform import InputStats

__all__ = ["SmoothPlus"]


@dataclass(frozen=True)
class SmoothPlus:
    """`alpha` None is a search over 0, 1/grid .. 1. `run_time`: see `ScaleSearch`."""

    alpha: float | None = None
    grid: int = 20
    run_time: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean_abs"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "smooth inputs against weights by channel, at a strength chosen by output error"
    paper: ClassVar[str] = "P131"

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UsageError(f"grid={self.grid}: at least 1 strength must be tried.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha}: it is between 0 and 1, or left out for a search.")

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
        columns = column_sizes(weights, channel_of, "smooth-plus")
        if stats.gram is None or stats.mean_abs is None or stats.tokens == 0:
            raise CalibrationError(
                "smooth-plus: no calibration statistics reached these weights; gram and mean_abs are needed."
            )
        needed = input_sizes(stats.mean_abs, stats.tokens, channel_of, "smooth-plus", "mean_abs")
        sizes, columns = bounded(needed), bounded(columns)
        if self.alpha is not None:
            return power(sizes, columns, self.alpha)
        tried = (power(sizes, columns, i / self.grid) for i in range(self.grid + 1))
        return least(chain([torch.ones_like(sizes)], tried), OutputError(weights, stats.gram, fmt).of)
