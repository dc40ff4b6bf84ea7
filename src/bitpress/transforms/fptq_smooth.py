"""FPTQ's logarithmic equalization: make every channel of an input as large as the logarithm of what it was.

Source   Li et al. 2023, "FPTQ: Fine-grained Post-Training Quantization for Large Language Models" (P275): its abstract, and its formula as
         llm-compressor has it (`LogarithmicEqualizationModifier`).
Differs  for every input that an earlier layer can divide; the paper's choice by layer between this, static scales and scales for every token is
         the recipe's `choose` by range (the recipe `fptq`). Channels below 1e-5 of the largest count as that. Factors are not centred.
Needs    max_abs [in] float32.      Cost  O(in).
Update   s = max |x| / log2(2 + max |x|)
Fails    CalibrationError when no token reached the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats import Format
from bitpress.transforms.sites import Sites
from bitpress.transforms.smoothing import check_weights, input_sizes, logarithmic
from bitpress.transforms.transform import InputStats

__all__ = ["FPTQSmooth"]


@dataclass(frozen=True)
class FPTQSmooth:
    """`run_time`: see `ScaleSearch`."""

    run_time: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"max_abs"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "make channels of inputs as large as the logarithms of their sizes"
    paper: ClassVar[str] = "P275"

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
        check_weights(weights, "fptq-smooth")
        return logarithmic(input_sizes(stats.max_abs, stats.tokens, channel_of, "fptq-smooth", "max_abs"))
