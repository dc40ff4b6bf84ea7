"""HIGGS: after a random Hadamard rotation weights are nearly normal, so round them to the optimal grid for normal numbers.

Source   Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"; the scale as in
         the authors' public code in transformers (`integrations/higgs.py`). The rotation is the transform `hadamard`, done before;
         the grids, of single weights or of pairs, are `formats.grids.gaussian`; bits layer by layer are `allocation.knapsack`.
Differs  a whole row is rotated at once, and scales are those of the format's blocks, where the code rotates and scales 1,024 weights
         together. clip="mse" searches the scale; the paper's is the block's root mean square alone.
Needs    nothing.                   Cost  O(out * in * 2^bits) time at most.
Update   scale = |block| / sqrt(n),  codes = argmin over points of |w / scale - point|
Fails    FormatError for grids that are not Gaussian. Without the rotation outliers lie beyond the outermost level.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["HIGGS"]


@dataclass(frozen=True)
class HIGGS(Quantizer):
    clip: Literal["minmax", "mse"] = "minmax"
    steps: int = 20
    smallest: float = 0.75

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ("hadamard",)
    summary: ClassVar[str] = "round to the grid best for normal weights, after a random Hadamard rotation; no data"
    paper: ClassVar[str] = "P263"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    serves: ClassVar[tuple[str, ...]] = ("gauss?-*", "gauss?x2-*")

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("higgs", self.serves, fmt)
        w = w.float()
        params = fmt.fit(w, shrink=shrink_ratios(self.clip, self.steps, self.smallest))
        codes = fmt.encode(w, params)
        energy = float(w.square().sum())
        # The layer's figure in the linearity theorem: the squared error of its weight over its square.
        error = float((fmt.decode(codes, params) - w).square().sum()) / energy if energy > 0 else 0.0
        return Outcome(CompressedWeight((Packed.pack(fmt, codes, params),)), figures={"relative_error": error})
