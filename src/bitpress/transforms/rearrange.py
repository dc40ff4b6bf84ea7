"""Rearrangement: stand channels of like size side by side, so that a block that shares a scale holds no outlier among small values.

Source   Trukhanov and Soloveychik 2024, "Accurate Block Quantization in LLMs with Outliers" (P009): its abstract is what could be read. Channels
         that are large in all texts are put together before any text is seen.
Differs  the paper rearranges the channels of keys for a cache with shared exponents, where the order folds into the matrices before. Here it
         is the input of any weight, by the root mean square on the calibration text, largest first, and the order stays online.
Needs    gram [in, in] float32.      Cost  2 bytes a channel (4 beyond 65,536 channels).
Update   T_in = P,  P sorts diag(gram)
Fails    CalibrationError without statistics.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats import Format, Permutation
from bitpress.transforms.balance import need_gram
from bitpress.transforms.basis import Maps
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Rearrange"]


@dataclass(frozen=True)
class Rearrange:
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = "sort the channels of inputs by size, so that blocks hold like ones"
    paper: ClassVar[str] = "P009"

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        order = need_gram(stats, "rearrange").diagonal().argsort(descending=True, stable=True)
        return Permutation.of(order.cpu()), None
