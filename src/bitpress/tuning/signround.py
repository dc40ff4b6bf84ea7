"""SignRound: an offset before rounding and the ends of the range, learned by the sign of the gradient.

Source   Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", and its public code
         (auto-round, `wrapper.py`, `sign_round/`): 200 steps of 8 texts at 1 / steps (2 / steps from 1,000 on at 3 bits or fewer), falling
         linearly, ends of the range at the same rate; the state of the least loss in a step is kept.
Differs  the range starts from what the closed form chose, and may grow or shrink by half from there; the authors start from the full range
         and let it shrink. Codes start from those of the closed form too. Held-out text, not calibration text, says which state is kept.
Update   w_hat = (clamp(round(w / s + v) + z, 0, top) - z) s,  v in [-1/2, 1/2],  s = (a high - b low) / top,  z = round(-b low / s)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats.grids.grid import Params
from bitpress.tuning.learned import Leaf, LearnedCodes, Start
from bitpress.tuning.ranges import LearnedRange
from bitpress.tuning.tuner import OptimizerName, ScheduleName, Tuning

__all__ = ["SignRound"]


@dataclass(frozen=True, kw_only=True)
class SignRound(Tuning):
    optimizer: OptimizerName = "sign"
    schedule: ScheduleName = "linear"
    ranges: bool = True

    summary: ClassVar[str] = "offsets before rounding and ends of ranges, by signed gradient descent"
    paper: ClassVar[str] = "yardstick: SignRound (arXiv 2309.05516)"
    serves: ClassVar[tuple[str, ...]] = ("int*",)

    def begin(self, start: Start) -> LearnedCodes:
        return _Offsets(start, self.ranges)


class _Offsets(LearnedCodes):
    def __init__(self, start: Start, ranges: bool) -> None:
        super().__init__(start)
        self.offset = torch.zeros_like(self.base, requires_grad=True)
        self.range = LearnedRange(start.fmt, start.params, low=0.5, high=1.5) if ranges else None

    def leaves(self) -> list[Leaf]:
        own = [Leaf(self.offset, low=-0.5, high=0.5)]
        return own if self.range is None else own + self.range.leaves()

    def params(self) -> Params:
        return self.given if self.range is None else self.range.params()

    def values(self, params: Params) -> Float[torch.Tensor, "out in"]:
        rows, cols = self.fmt.block.resolve((self.base.shape[0], self.base.shape[1]))
        scale = params["scale"] if rows == 1 else params["scale"].repeat_interleave(rows, 0)
        return self.base + self.offset * scale.repeat_interleave(cols, 1)
