"""Learned weight clipping: the ends of every block's range, as sigmoids.

Source   Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", and its public code
         (`main.py`, `quantize/quantizer.py`): sigmoids from 4, AdamW without decay at 1e-2, 20 passes over 128 texts, one a step.
Differs  the sigmoids start where they give the closed form's range (the authors: nearly the full range), and weights may have a closed form's
         codes at the start; 200 steps of 8 texts. Its equivalent transformation is not part of this row.
Update   scale = (sigmoid(a) high - sigmoid(b) low) / top,  w_hat = (clamp(round(w / scale) + zero, 0, top) - zero) scale
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.formats.grids.grid import Params
from bitpress.tuning.learned import Leaf, LearnedCodes, Start
from bitpress.tuning.ranges import has_two_ends, range_params
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["LearnedClipping"]

# Where the sigmoids start: nearly open, as the authors'.
OPEN = 4.0


@dataclass(frozen=True, kw_only=True)
class LearnedClipping(Tuning):
    rate: float | None = 1e-2
    schedule: ScheduleName = "constant"

    summary: ClassVar[str] = "ends of ranges as sigmoids; codes follow by rounding to nearest"
    paper: ClassVar[str] = "P133"
    serves: ClassVar[tuple[str, ...]] = ("int*",)

    def begin(self, start: Start) -> LearnedCodes:
        return _Clipping(start)


class _Clipping(LearnedCodes):
    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.ends = [
            torch.full_like(start.params["scale"], OPEN, requires_grad=True) for _ in range(1 + has_two_ends(start.params))
        ]
        # Computed as the sigmoids are, so that the first factor is 1 to the last bit.
        self.full = torch.sigmoid(self.ends[0].detach())

    def leaves(self) -> list[Leaf]:
        return [Leaf(end) for end in self.ends]

    def params(self) -> Params:
        up, down = (torch.sigmoid(end) / self.full for end in (self.ends[0], self.ends[-1]))
        return range_params(self.fmt, self.given, up, down)
