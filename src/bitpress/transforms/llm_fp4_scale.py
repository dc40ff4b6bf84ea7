"""LLM-FP4's channel bias: scale channels of inputs by powers of two, which floats of weights hold in their exponents.

Source   Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (P008): its abstract is what could be read. A scale for every
         channel of an input is moved into the exponents of the weights, so that a product of floats needs no other.
Differs  the power nearest to the channel's largest magnitude, and no channel further from the largest than `octaves`; it folds into the
         norm or matrix before the weights. Exponent bits are chosen by the recipe's `choose` (the recipe `llm-fp4`), clipping is the
         quantizer's and the observer's.
Needs    max_abs [in] float32.      Cost  O(in).
Update   s = 2^round(log2 max |x|) by channel
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
from bitpress.transforms.smoothing import bounded, check_weights, input_sizes
from bitpress.transforms.transform import InputStats

__all__ = ["LLMFP4Scale"]


@dataclass(frozen=True)
class LLMFP4Scale:
    """Factors differ by 2^octaves at most. `run_time`: see `ScaleSearch`."""

    octaves: int = 6
    run_time: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "scale channels of inputs by powers of two, into the exponents of weights"
    paper: ClassVar[str] = "P008"

    def __post_init__(self) -> None:
        if not 1 <= self.octaves <= 16:
            raise UsageError(f"octaves={self.octaves}: it is from 1 to 16.")

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
        check_weights(weights, "llm-fp4-scale")
        sizes = input_sizes(stats.max_abs, stats.tokens, channel_of, "llm-fp4-scale", "max_abs")
        return torch.exp2(bounded(sizes).log2().round().clamp(min=-self.octaves))
