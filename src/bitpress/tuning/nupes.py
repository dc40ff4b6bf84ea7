"""NUPES: the power of every block is learned, with weights that may take any code.

Source   Yvinec et al. 2023, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", known here from its abstract: weights are
         learned over the whole quantized space, not up or down alone, and the exponent with them.
Differs  the exponent is one of the format's list, a quarter apart; its gradient passes straight through the choice, and so do the weights'
         through the rounding. One exponent a block, scales too.
Update   w_hat = sign(q) (|q| / 2^(bits-1))^p s,   d w_hat / d p = w_hat log(|q| / 2^(bits-1))
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats.fake_quantize import inside_range
from bitpress.tuning.block_ap import ShiftedWeights
from bitpress.tuning.learned import Leaf, LearnedTerm, Start
from bitpress.tuning.relaxation import pass_through
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["NUPES"]

# The exponents of the formats are 1, 1.25, 1.5 and so on.
STEP = 0.25


@dataclass(frozen=True, kw_only=True)
class NUPES(Tuning):
    """`rate` is that of weights and scales, relative to their mean size; exponents have `powers` times as much, in places of the list."""

    rate: float | None = 5e-3
    schedule: ScheduleName = "cosine"
    powers: float = 4.0

    summary: ClassVar[str] = "weights, scales and the power of every block"
    paper: ClassVar[str] = "P217"
    serves: ClassVar[tuple[str, ...]] = ("pow*", "nupes*")

    def begin(self, start: Start) -> LearnedTerm:
        return _Powers(start, self.powers)


class _Powers(ShiftedWeights):
    def __init__(self, start: Start, rate: float) -> None:
        super().__init__(start, scales=1.0, zeros=False)
        self.power_rate = rate
        self.which = torch.zeros_like(self.given["which"], requires_grad=True)
        self.half = 1 << (self.fmt.grid.code_bits - 1)

    def leaves(self) -> list[Leaf]:
        return [*super().leaves(), Leaf(self.which, self.power_rate)]

    def params(self) -> dict[str, torch.Tensor]:
        return {**super().params(), "which": self.given["which"] + self.which}

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        params = self.stored_params()
        fixed = {name: t.detach() for name, t in params.items()}
        values = self.values(params)
        codes = self.fmt.encode(values.detach(), fixed)
        across = self.fmt.per_block(params)
        q = self.fmt.to_blocks(codes).float() - self.half
        size = torch.where(q == 0, 1.0, q.abs() / self.half)
        formula = q.sign() * size.pow(1 + STEP * across["which"]) * across["scale"]
        decoded = pass_through(self.fmt.from_blocks(formula, values.shape[0]), self.fmt.decode(codes, fixed))
        return decoded + pass_through(values, torch.zeros_like(values), inside_range(values.detach(), self.fmt, fixed))
