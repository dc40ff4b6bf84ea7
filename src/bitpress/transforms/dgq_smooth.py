"""DGQ's percentile smoothing: bring the few largest channels of an input down to the one that all others are below.

Source   Zhang et al. 2023, "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM" (P267), and its public code
         (`quant/smooth.py`): the limit is the channel of rank 0.005 n + 1.5 from the top.
Differs  wherever an earlier layer can take the division; the code does so behind norms, and before the down projection of Llama. The weights in
         two grains (integers of 4 bits that become such of 8 before the product) are a number format with coarse scales.
Needs    max_abs [in] float32.      Cost  O(in log in).
Update   s = max(1, max |x| / limit)
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
from bitpress.transforms.smoothing import beyond, check_weights, input_sizes
from bitpress.transforms.transform import InputStats

__all__ = ["DGQSmooth"]


@dataclass(frozen=True)
class DGQSmooth:
    """`share` of the channels is brought down. `run_time`: see `ScaleSearch`."""

    share: float = 0.005
    run_time: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "bring the largest channels of inputs down to a percentile of all"
    paper: ClassVar[str] = "P267"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"share={self.share}: it is at least 0 and below 1.")

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
        check_weights(weights, "dgq-smooth")
        sizes = input_sizes(stats.max_abs, stats.tokens, channel_of, "dgq-smooth", "max_abs")
        limit = float(sizes.sort(descending=True).values[min(int(len(sizes) * self.share + 1.5), len(sizes)) - 1])
        return beyond(sizes, limit) if limit > 0 else torch.ones_like(sizes)
