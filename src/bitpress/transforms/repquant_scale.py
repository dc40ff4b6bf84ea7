"""RepQuant: outputs of norms are calibrated with a scale and a zero point for every channel, and computed with one of each for all.

Source   Li et al. 2024, "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale Reparameterization"
         (P231), its abstract, and the public code of its forerunner RepQ-ViT (`classification/test_quant.py`).
Differs  these are the factors; the shifts are the transform `shift` before it, with ends: clipped and place: folded, which brings the middle of
         each channel's range to 0 where the code brings its zero point to the mean of all. Ends of channels are searched by squared error on a sample,
         where the paper learns both by gradients and the code tries three percentiles. An RMS norm has no bias that takes a shift: there a channel's
         scale is that of its larger end. What no norm makes keeps a scale for all channels, as in the paper. The softmax is the format
         `sqrtlogN` of probabilities, whose odd codes are powers of 2 times the square root of 2: the paper's second reparametrisation.
Needs    sample [tokens, in] float32.      Cost  nothing stored; O(tokens * in) a trial.
Update   r = s / mean(s);  norm: g / r, (b - z) / r;  behind it: w r, bias + w z;  s: half the range of a channel, z: its middle
Fails    CalibrationError when no token reached the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import CalibrationError
from bitpress.formats import Format
from bitpress.transforms.awq_scale import tie
from bitpress.transforms.channel_ends import clipped_ends
from bitpress.transforms.sites import Sites
from bitpress.transforms.smoothing import bounded, check_weights
from bitpress.transforms.transform import InputStats

__all__ = ["RepQuantScale"]


@dataclass(frozen=True)
class RepQuantScale:
    run_time: ClassVar[bool] = False  # factors that stay online would cost what one scale for all channels saves

    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"folded"})}
    summary: ClassVar[str] = "outputs of norms calibrated by channel, then rounded with one scale for all channels"
    paper: ClassVar[str] = "P231"

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
        check_weights(weights, "repquant-scale")
        if stats.sample is None or len(stats.sample) == 0:
            raise CalibrationError("repquant-scale: no calibration statistics reached these weights; sample is needed.")
        low, high = clipped_ends(stats.sample, inputs)
        sizes = torch.maximum(low.abs(), high.abs())
        if producer is not None:  # a matrix makes this input, not a norm
            return torch.ones_like(sizes)
        scales = bounded(sizes if channel_of is None else tie(sizes, channel_of))
        return scales / scales.mean()
