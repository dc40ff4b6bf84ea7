"""AdaQuant: weights and scales of every layer alone, by the error of its own output.

Source   Hubara et al. 2020, "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", known here from its
         abstract: every layer's error over the calibration set is made small by itself, so that little text suffices.
Differs  the error is that of all calibration tokens in every step, by the gram of the layer's inputs. Biases and statistics of norms, which the
         paper tunes after, are those of `parameters` or `norm-tweaking`; its integer program is that of a budget.
Update   w_hat = Q_s(w + v),  v and s by Adam on  sum((w - w_hat) gram (w - w_hat)') / sum(w gram w')
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.tuning.block_ap import BlockAP
from bitpress.tuning.tuner import Span

__all__ = ["AdaQuant"]


@dataclass(frozen=True, kw_only=True)
class AdaQuant(BlockAP):
    span: Span = "layer"

    summary: ClassVar[str] = "weights, scales and zero points of every layer by its own output"
    paper: ClassVar[str] = "P246"
