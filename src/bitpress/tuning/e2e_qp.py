"""E2E-QP: the scales of all blocks at once under fixed codes, by the text's next tokens.

Source   Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", its second phase, and its public code
         (`main_e2e_qp.py`): step sizes by AdamW without decay, from the result of Block-AP, gradients clipped to a norm of 0.3, a rate of 2e-5 by
         default, falling by a cosine after a warm-up, checkpoints of gradients, on the cross entropy of texts.
Differs  200 steps of 2 windows of the calibration text, with a rate that is relative to the mean size of the scales, without clipping and warm-up.
         `loss: kl-top` takes the original's likeliest tokens as targets, which needs no more text than there is; norms by `norms`.
Update   w_hat = decode(codes, scales),  scales by Adam on the mean cross entropy
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.tuning.parameters import Parameters
from bitpress.tuning.tuner import LossName, Span

__all__ = ["E2EQP"]


@dataclass(frozen=True, kw_only=True)
class E2EQP(Parameters):
    rate: float | None = 1e-3
    batch: int = 2
    span: Span = "network"
    loss: LossName = "cross-entropy"
    norms: float = 0.0

    summary: ClassVar[str] = "scales of all blocks at once, by the text's next tokens"
    paper: ClassVar[str] = "P127"
