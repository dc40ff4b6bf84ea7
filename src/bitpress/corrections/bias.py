"""Bias correction: add the mean error of a product to its bias.

Source   Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", as the white paper (P178) and the study
         of minifloats (P006) use it; known here from summaries: the empirical correction, E[w x] - E[Q(w) Q(x)].
Differs  the mean is over a sample of tokens, with inputs as calibration saw them, and counts the rounding of the input too. A layer without a
         bias stays as it is, and its row in the report says so: none is added to an architecture.
Needs    sample [tokens, in] float32.      Cost  nothing stored; one product with the sample.
Update   b += mean over tokens of w x - Q(w) Q(x)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

__all__ = ["BiasCorrection"]


@dataclass(frozen=True)
class BiasCorrection:
    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    summary: ClassVar[str] = "the mean error of a product's output, added to its bias"
    paper: ClassVar[str] = "P178"

    def change(
        self, wanted: Float[torch.Tensor, "tokens out"], given: Float[torch.Tensor, "tokens out"]
    ) -> Float[torch.Tensor, " out"]:
        """Return what to add to the bias, from the outputs of the original product and of the compressed one."""
        return (wanted - given).mean(0)
