"""DB-LLM: two binary planes with scales of their own in place of an integer of 2 bits; the part that needs no training.

Source   Chen et al. 2024, "DB-LLM: Accurate Dual-Binarization for Efficient LLMs", flexible dual binarization. Its code is not
         public; its equations are known here from summaries of the paper.
Differs  the paper learns the scales by distillation (its other half, for a tuner); here they are the best for the planes by least
         squares, planes and scales in turn. The step s of the start is the best of `starts` parts of the largest weight, upright and
         mirrored, where the paper takes that of its 2-bit rounding. A block where the format's own fit is nearer keeps that one.
Needs    nothing.                   Cost  one sort of the weights.
Update   w_hat = a d_1 - b d_2,  d_1, d_2 in {0, 1};  a = 2 s, b = s to begin with: the levels -s, 0, s, 2 s of 2 bits;
         d_1 = [w > (a - b) / 2],  d_2 = [w - a d_1 < -b / 2]:  the nearest level while a > b, else with both planes changed over
Fails    NumericsError when a weight is not finite.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.quantizers.mechanisms.two_planes import best_planes, by_block
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["DBLLM"]


@dataclass(frozen=True)
class DBLLM(Quantizer):
    starts: int = 1
    steps: int = 20

    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "two binary planes with a scale each, planes and scales in turn"
    paper: ClassVar[str] = "P318"
    bits: ClassVar[tuple[float, float]] = (2, 2)
    serves: ClassVar[tuple[str, ...]] = ("dual2-*",)

    def __post_init__(self) -> None:
        if self.starts < 1 or self.steps < 1:
            raise UsageError(f"starts and steps of 1 or more are needed, got {self.starts}, {self.steps}.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("db_llm", self.serves, fmt)
        step = by_block(w, fmt).abs().amax(1, keepdim=True) / 2
        planes = [torch.tensor(ab, device=w.device) for ab in ((2.0, 1.0), (1.0, 2.0))]
        starts = [step * part / self.starts * ab for part in range(self.starts, 0, -1) for ab in planes]
        return best_planes(w, fmt, starts, self.steps, condition=1e6)
