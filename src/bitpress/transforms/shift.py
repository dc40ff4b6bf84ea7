"""Shifting: round the distance of every channel of an input from the middle of its range, so that channels that lie far from 0 need no wider
range than others.

Source   Wei et al. 2023, "Outlier Suppression+: Accurate quantization of large language models by equivalent and optimal shifting and scaling"; the
         same shift is the symmetrization of OutlierTune (P242), the bias term of MPTQ-ViT's smoothing (P384) and an option of DGQ's public
         code (`mean_bias` in `quant/smooth.py`, P267).
Differs  the middle is that of a sample of tokens. The shift stays online in every architecture, as part of how the input is rounded
         (`formats.channels`): what the product sees is the middle plus a rounded distance, so that w times the middle, which the papers put
         into a bias, comes from the compressed weight. In another basis the shift follows the map. Smoothing that comes after it sees
         distances: shift, then `smoothquant` with alpha: 1 and static inputs is OutlierTune's format, with another alpha MPTQ-ViT's.
Needs    sample [tokens, in] float32.      Cost  4 bytes a channel; two additions a channel and token.
Update   z = (max x + min x) / 2 by channel;  Q(x) becomes z + Q(x - z)
Fails    CalibrationError when no token reached the weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Shift"]


@dataclass(frozen=True)
class Shift:
    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = "round the distances of inputs from the middle of each channel's range"
    paper: ClassVar[str] = "yardstick: Outlier Suppression+"

    def plan(self, stats: InputStats) -> Float[torch.Tensor, " in"]:
        """Return the middle of every channel, float32."""
        if stats.sample is None or len(stats.sample) == 0:
            raise CalibrationError("shift: no calibration statistics reached this weight; sample is needed.")
        low, high = torch.aminmax(stats.sample.float(), dim=0)
        return low + (high - low) / 2
