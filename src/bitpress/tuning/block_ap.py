"""Block-AP: weights, scales and zero points are all learned, by the output of a block.

Source   Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", its first phase, and its public
         code (`quantize/block_ap.py`, `quantize/quantizer.py`): AdamW without decay, weights at 1e-5 (2e-5 at 2 bits), scales and zero points at
         1e-4, both falling to a twentieth by a cosine; 2 passes over 4,096 texts of 2,048 tokens, 2 a step, to the uncompressed model's output.
Differs  starts from a closed form's codes, scales and zero points (the authors: the full range, rounding to nearest); 200 steps, falling to 0.
         Rates are relative to the mean size of the weights, the scales, and 1 for zero points.
Update   w_hat = (clamp(round(w / s) + round(z), 0, top) - round(z)) s, all of w, s, z by Adam, straight through the rounding
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.formats.grids.grid import Params
from bitpress.tuning.learned import Leaf, LearnedCodes, Start
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["BlockAP", "ShiftedWeights"]


@dataclass(frozen=True, kw_only=True)
class BlockAP(Tuning):
    """`rate` is that of the weights, relative to the mean size of a weight; scales have `scales` times as much."""

    rate: float | None = 5e-3
    schedule: ScheduleName = "cosine"
    scales: float = 1.0
    zeros: bool = True

    summary: ClassVar[str] = "weights, scales and zero points, straight through the rounding"
    paper: ClassVar[str] = "P127"
    serves: ClassVar[tuple[str, ...]] = ("*", "!tcq*")

    def begin(self, start: Start) -> LearnedCodes:
        return ShiftedWeights(start, self.scales, self.zeros)


class ShiftedWeights(LearnedCodes):
    """Weights by a shift, and parameters of the codes. Leaves are relative to their start, so that one rate suits layers of any size."""

    def __init__(self, start: Start, scales: float, zeros: bool) -> None:
        super().__init__(start)
        self.size = start.target.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        self.shift = torch.zeros_like(self.base, requires_grad=True)
        self.rate = scales
        moving = [p for p in self.fmt.grid.params if p.kind != "code" or (zeros and p.name == "zero")]
        self.moved = {p.name: torch.zeros_like(self.given[p.name], requires_grad=True) for p in moving} if scales else {}
        self.units = {p.name: _unit(self.given[p.name], p.kind == "code") for p in moving}

    def leaves(self) -> list[Leaf]:
        return [Leaf(self.shift), *(Leaf(t, self.rate) for t in self.moved.values())]

    def params(self) -> Params:
        return {name: t + self.moved[name] * self.units[name] if name in self.moved else t for name, t in self.given.items()}

    def values(self, params: Params) -> Float[torch.Tensor, "out in"]:
        return self.base + self.shift * self.size


def _unit(given: torch.Tensor, is_code: bool) -> torch.Tensor:
    """Return what 1 of a leaf stands for: one step of a zero point, the size of a scale, the mean size of levels."""
    if is_code:
        return torch.ones((), device=given.device)
    return given.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
