"""QQQ's adaptive smoothing: bring the largest channels of an input down to a limit that is searched with both sides rounded.

Source   Zhang et al. 2024, "QQQ: Quality Quattuor-Bit Quantization for Large Language Models" (P291), and its public code
         (`smooth/migration/migration_llama.py`, the search that it calls os+, after Outlier Suppression+).
Differs  the limit falls in `grid` equal steps from the largest channel to `smallest` of it, where the code takes 100 steps or more, down to
         0.1; the error is that of the outputs of the weights that share the input, on a sample of tokens, where the code runs attention
         and activation behind them, and then GPTQ is the quantizer's part.
Needs    max_abs [in], sample [tokens, in] float32.      Cost  O(grid * tokens * out * in).
Update   s = max(1, max |x| / limit),  limit = argmin of |Q(x / s) Q(w s)' - x w'|^2
Fails    CalibrationError when no token reached the weights. No smoothing is tried too, so the error on the sample is never larger.
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
from bitpress.transforms.smoothing import ProductError, beyond, check_weights, input_sizes, least
from bitpress.transforms.transform import InputStats

__all__ = ["QQQSmooth"]


@dataclass(frozen=True)
class QQQSmooth:
    """`grid` limits from the largest channel down to `smallest` of it. `run_time`: see `ScaleSearch`."""

    grid: int = 20
    smallest: float = 0.02
    run_time: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs", "sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "bring large channels of inputs down to a limit chosen with both sides rounded"
    paper: ClassVar[str] = "P291"

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise UsageError(f"grid={self.grid}: at least 2 limits must be tried.")
        if not 0 < self.smallest < 1:
            raise UsageError(f"smallest={self.smallest}: it is above 0 and below 1.")

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
        check_weights(weights, "qqq-smooth")
        sizes = input_sizes(stats.max_abs, stats.tokens, channel_of, "qqq-smooth", "max_abs")
        error_of = ProductError.on(stats, weights, fmt, inputs, "qqq-smooth").of
        largest = float(sizes.max())
        if not largest > 0:
            return torch.ones_like(sizes)
        steps = [1 - (1 - self.smallest) * i / (self.grid - 1) for i in range(self.grid)]
        return least((beyond(sizes, largest * step) for step in steps), error_of)
