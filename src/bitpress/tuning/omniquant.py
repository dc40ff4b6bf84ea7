"""OmniQuant's equivalent transformation: channel factors and shifts of inputs are learned, with the ends of the weights' ranges.

Source   Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", and its public code
         (`quantize/omniquant.py`): sigmoids of the ranges at 1e-2, scales and shifts at 1e-3 for W4A4
         (`scripts/Llama-2/Llama-2-7b/w4a4.sh`), AdamW, 20 passes over the texts, on the squared error to the uncompressed block's output. Its clipping alone, behind codes of a closed form: `learned-clipping`.
Differs  factors are learned by their logarithms from what the recipe's transforms chose (`smoothquant`: as the authors start), for every input
         and not three of a block; those between queries and keys are not learned. Shifts are part of how an input is rounded, behind its
         map, so that no bias is needed; weights alone have none. 200 steps of a falling rate.
Update   s by its logarithm, folded where a norm or a matrix takes it,  Q_x(u) = z + Q(u - z),  w_hat = Q(w s) / s
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.tuning.learned_maps import LearnedMatrix, MapTuning

__all__ = ["OmniQuant"]


@dataclass(frozen=True, kw_only=True)
class OmniQuant(MapTuning):
    scales: float = 1.0
    shifts: float = 1.0
    clip_weights: float = 2.0

    summary: ClassVar[str] = "factors and shifts of channels, with ends of the weights' ranges as sigmoids"
    paper: ClassVar[str] = "P133"

    def matrix(self, width: int, device: torch.device) -> LearnedMatrix | None:
        return None
