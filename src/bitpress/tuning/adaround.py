"""AdaRound: every weight rounds down or up, by a soft bit that is pushed towards 0 or 1.

Source   Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"; the details of its bits
         as in the public code of BRECQ (`quant/adaptive_rounding.py`, `quant/layer_recon.py`): the stretch, the start, Adam at 1e-3, the sum
         of the regulariser times 0.001 to 0.01.
Differs  behind a closed form one neighbour is its code, the other the next one towards the target; scales stay the closed form's. The loss is
         relative to the energy
         of the span's targets, so the regulariser's weight is in units of that. 200 steps in place of 10,000 or more.
Update   w_hat = (clamp(floor(w / s) + h(v) + z, 0, top) - z) s,  h = rectified sigmoid,
         loss + weight * mean(1 - |2 h - 1|^power), the power falling from 20 to 2, without regulariser in the first fifth of the steps
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats.grids.grid import EvenlySpaced, Params
from bitpress.tuning.learned import Leaf, LearnedCodes, Start
from bitpress.tuning.relaxation import rectified_sigmoid, rectified_sigmoid_inverse, undecided
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["AdaRound", "SoftBits"]

# The share of the steps without regulariser, and the power at the first and the last step behind it.
WARM_UP = 0.2
POWERS = (20.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class AdaRound(Tuning):
    rate: float | None = 1e-2
    schedule: ScheduleName = "constant"
    weight: float = 0.1

    summary: ClassVar[str] = "rounding down or up, by soft bits that end hard"
    paper: ClassVar[str] = "P288"
    serves: ClassVar[tuple[str, ...]] = ("int*", "!int*-min*")

    def begin(self, start: Start) -> LearnedCodes:
        return SoftBits(start, self.weight)


class SoftBits(LearnedCodes):
    """A soft bit for every weight. What learns them in another way overrides `soft`, and where scales are learned too, `across`."""

    def __init__(self, start: Start, weight: float) -> None:
        super().__init__(start)
        grid = self.fmt.grid
        assert isinstance(grid, EvenlySpaced)
        params = self.fmt.per_block(self.given)
        self.scale, self.zero, self.top = params["scale"], grid.zero_of(params), grid.top
        chosen = self.fmt.to_blocks(start.codes.float()) - self.zero
        steps = self.fmt.to_blocks(start.target) / torch.where(self.scale == 0, 1.0, self.scale)
        below = steps < chosen
        self.floor = chosen - below.float()
        soft = steps - self.floor
        # The bit begins on the side of the code that was chosen, however far away the target is.
        soft = torch.where(below, soft.clamp(0.51, 0.99), soft.clamp(0.01, 0.49))
        self.bits = rectified_sigmoid_inverse(soft).requires_grad_()
        self.weighted = weight

    def leaves(self) -> list[Leaf]:
        return [Leaf(self.bits)]

    def soft(self) -> torch.Tensor:
        """Return what the soft bits are the rectified sigmoid of, [blocks, values of a block]."""
        return self.bits

    def across(self) -> torch.Tensor:
        """Return the scale of every block as stored, with a gradient where it is learned."""
        return self.scale

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        codes = (self.floor + rectified_sigmoid(self.soft()) + self.zero).clamp(0, self.top)
        return self.fmt.from_blocks((codes - self.zero) * self.across(), self.base.shape[0])

    def penalty(self, progress: float) -> torch.Tensor | None:
        if progress < WARM_UP:
            return None
        behind = (progress - WARM_UP) / (1 - WARM_UP)
        return self.weighted * undecided(rectified_sigmoid(self.soft()), POWERS[0] + (POWERS[1] - POWERS[0]) * behind)

    def values(self, params: Params) -> Float[torch.Tensor, "out in"]:
        hard = self.floor + (rectified_sigmoid(self.soft()) >= 0.5)
        return self.fmt.from_blocks(hard * self.across(), self.base.shape[0])
