"""JLCM, its first step: rows grouped by similar distribution, a codebook (or a scale) per group, no index of groups.

Source   Yvinec et al. 2023, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings", known here
         from its abstract: neurons are re-ordered so that those of similar distribution are adjacent and share a codebook.
Differs  the joint learning of codebooks and mappings by gradients is left out; rows are similar if their root mean squares are;
         groups are equally large; the order is stored as the weight's output map, 16 bits a row, where the paper's is folded into
         the network.
Needs    nothing.                   Cost  one fit of the format.
Update   order = argsort(rms of rows);  one block of parameters for every out / groups rows of w[order]
Fails    FormatError if the groups do not divide the rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import Block, CompressedWeight, Format, Packed, Permutation
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["JLCM"]


@dataclass(frozen=True)
class JLCM(Quantizer):
    groups: int = 8
    steps: int = 20
    smallest: float = 0.3

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    serves: ClassVar[tuple[str, ...]] = ("*-tensor*",)
    summary: ClassVar[str] = "rows re-ordered into groups of like distribution, a codebook or scale for each"
    paper: ClassVar[str] = "P268"
    bits: ClassVar[tuple[float, float]] = (2, 4)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        if self.groups < 1:
            raise UsageError(f"groups={self.groups}: must be 1 or more.")

    @property
    def keeps_map(self) -> bool:
        return True

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("jlcm", self.serves, fmt)
        out_features, in_features = w.shape
        if out_features % self.groups:
            raise FormatError(f"jlcm: out_features={out_features} is not a multiple of groups={self.groups}; use fewer groups.")
        grouped = Format(fmt.grid, Block(out_features // self.groups, in_features), fmt.scale, fmt.layout)
        order = torch.argsort(w.float().square().mean(1), stable=True)
        rows = w.float()[order]
        params = grouped.fit(rows, shrink=shrink_ratios("mse", self.steps, self.smallest))
        packed = Packed.pack(grouped, grouped.encode(rows, params), params)
        return Outcome(CompressedWeight((packed,), output_map=Permutation.of(torch.argsort(order))))
