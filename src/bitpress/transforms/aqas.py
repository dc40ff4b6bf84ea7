"""AQAS: smooth inputs against weights at the strength that is best when both are rounded.

Source   Lee et al. 2023, "Enhancing Computation Efficiency in Large Language Models through Weight and Activation Quantization" (P161): its
         abstract and a summary of it are what could be read: factors that make up for the rounding of weights and of activations together.
Differs  factors are SmoothQuant's, their strength the best of a grid for each group of weights, by the error of their outputs on a sample of
         inputs: SmoothQuant with its strength searched. Without a format of inputs only weights are rounded. The calibration with texts as
         long as those of the task is `calibration.length`; integers with denormals (dINT) are left out: no runtime has them.
Needs    max_abs [in], sample [tokens, in] float32.      Cost  O(grid * tokens * out * in).
Update   s = max |x|^alpha / max |w|^(1 - alpha),  alpha = argmin over i / grid of |Q(x / s) Q(w s)' - x w'|^2
Fails    CalibrationError when no token reached the weights. No smoothing is tried too, so the error on the sample is never larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.transforms.sites import Sites
from bitpress.transforms.smoothing import ProductError, bounded, column_sizes, input_sizes, least, power
from bitpress.transforms.transform import InputStats

__all__ = ["AQAS"]


@dataclass(frozen=True)
class AQAS:
    """`grid` is the number of steps from 0 to 1. `run_time`: see `ScaleSearch`."""

    grid: int = 20
    run_time: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs", "sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "smooth inputs against weights at a strength chosen with both rounded"
    paper: ClassVar[str] = "P161"

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UsageError(f"grid={self.grid}: at least 1 strength must be tried.")

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
        columns = bounded(column_sizes(weights, channel_of, "aqas"))
        sizes = bounded(input_sizes(stats.max_abs, stats.tokens, channel_of, "aqas", "max_abs"))
        tried = (power(sizes, columns, i / self.grid) for i in range(self.grid + 1))
        return least(chain([torch.ones_like(sizes)], tried), ProductError.on(stats, weights, fmt, inputs, "aqas").of)
