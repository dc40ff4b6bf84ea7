"""Shifting: round the distance of every channel of an input from the middle of its range, so that channels that lie far from 0 need no wider
range than others.

Source   Wei et al. 2023, "Outlier Suppression+: Accurate quantization of large language models by equivalent and optimal shifting and scaling"; the
         same shift is the symmetrization of OutlierTune (P242), the bias term of MPTQ-ViT's smoothing (P384) and an option of DGQ's public
         code (`mean_bias` in `quant/smooth.py`, P267).
Differs  the middle is that of a sample of tokens, of all its values or between the ends of least squared error (ends: clipped). The shift
         stays online in every architecture, as part of how the input is rounded (`formats.channels`): what the product sees is the middle plus a
         rounded distance, so that w times the middle, which the papers put into a bias, comes from the compressed weight. In another basis
         the shift follows the map. With place: folded a norm in front takes the shift into its bias, and the layers behind it make up for
         it in theirs with the original weight, as in the papers; inputs without such a norm are not shifted, or with place: either online. Smoothing that comes after it sees
         distances: shift, then `smoothquant` with alpha: 1 and static inputs is OutlierTune's format, with another alpha MPTQ-ViT's.
Needs    sample [tokens, in] float32.      Cost  4 bytes a channel and two additions a channel and token; nothing where it is folded.
Update   z = (max x + min x) / 2 by channel;  Q(x) becomes z + Q(x - z);  folded: norm's bias - z, layer's bias + w z
Fails    CalibrationError when no token reached the weight.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format
from bitpress.transforms.channel_ends import channel_ends, clipped_ends
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Shift"]


@dataclass(frozen=True)
class Shift:
    """`place` is where shifts are made: "online", "folded" into norms and no others, or "either", online where none folds. `ends`: of "all"
    values of a channel, or "clipped"."""

    place: Literal["online", "folded", "either"] = "online"
    ends: Literal["all", "clipped"] = "all"

    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded", "online"})}
    summary: ClassVar[str] = "round the distances of inputs from the middle of each channel's range"
    paper: ClassVar[str] = "yardstick: Outlier Suppression+"

    def __post_init__(self) -> None:
        if self.place not in ("online", "folded", "either"):
            raise UsageError(f"place={self.place!r}: it is 'online', 'folded' or 'either'.")
        if self.ends not in ("all", "clipped"):
            raise UsageError(f"ends={self.ends!r}: it is 'all' or 'clipped'.")

    def plan(self, stats: InputStats, inputs: Format | None = None) -> Float[torch.Tensor, " in"]:
        """Return the middle of every channel, float32. `inputs` is the format in which the input is rounded, for clipped ends."""
        if stats.sample is None or len(stats.sample) == 0:
            raise CalibrationError("shift: no calibration statistics reached this weight; sample is needed.")
        low, high = channel_ends(stats.sample) if self.ends == "all" else clipped_ends(stats.sample, inputs)
        return low + (high - low) / 2
