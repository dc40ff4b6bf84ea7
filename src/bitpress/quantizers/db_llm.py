"""DB-LLM: two binary planes, each with its own scale, instead of a 2-bit integer; only the part that needs no training.

Source   Chen et al. 2024, "DB-LLM: Accurate Dual-Binarization for Efficient LLMs", flexible dual binarization. Its code is not
         public; its equations are taken from summaries of the paper.
Differs  the paper learns the scales by distillation; here planes and scales alternate, scales by least squares. The first step s is
         the best of `starts` fractions of the largest weight, upright and mirrored, where the paper takes that of its 2-bit rounding.
         A block keeps the format's own fit if that is nearer.
Needs    nothing.                   Cost  one sort of the weights.
Update   w_hat = a d_1 - b d_2,  d_1, d_2 in {0, 1};  a = 2 s, b = s to begin with: the levels -s, 0, s, 2 s of 2 bits;
         d_1 = [w > (a - b) / 2],  d_2 = [w - a d_1 < -b / 2]:  the nearest level while a > b, otherwise with the planes exchanged
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
            raise UsageError(f"starts and steps must be 1 or more, got {self.starts}, {self.steps}.")

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("db_llm", self.serves, fmt)
        step = by_block(w, fmt).abs().amax(1, keepdim=True) / 2
        planes = [torch.tensor(ab, device=w.device) for ab in ((2.0, 1.0), (1.0, 2.0))]
        starts = [step * part / self.starts * ab for part in range(self.starts, 0, -1) for ab in planes]
        return best_planes(w, fmt, starts, self.steps, condition=1e6)
