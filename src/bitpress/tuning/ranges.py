"""The ends of the range of every block as factors of those that a closed form chose."""

import torch

from bitpress.formats import Format
from bitpress.formats.grids.grid import Params
from bitpress.tuning.learned import Leaf

__all__ = ["LearnedRange", "range_params"]


def range_params(fmt: Format, params: Params, up: torch.Tensor, down: torch.Tensor) -> Params:
    """Return parameters of integers whose range reaches `up` times as high and `down` times as low; without a zero point, up alone counts.

    scale = (up high - down low) / top,   zero = -down low / scale,   high = (top - z) s,   low = -z s
    """
    scale = params["scale"]
    if "zero" not in params:
        return {**params, "scale": scale * up}
    zero, top = params["zero"], float((1 << fmt.grid.code_bits) - 1)
    high, low = (top - zero) * up, zero * down
    steps = (high + low) / top  # the new scale in units of the old one
    safe = torch.where(steps == 0, 1.0, steps)
    return {**params, "scale": scale * steps, "zero": torch.where(steps == 0, zero, low / safe)}


class LearnedRange:
    """Two factors for every block (one without a zero point), from 1, within bounds."""

    def __init__(self, fmt: Format, params: Params, *, low: float, high: float, rate: float = 1.0) -> None:
        self.fmt, self.given, self.bounds, self.rate = fmt, dict(params), (low, high), rate
        self.up = torch.ones_like(params["scale"], requires_grad=True)
        self.down = torch.ones_like(params["scale"], requires_grad=True) if "zero" in params else self.up

    def leaves(self) -> list[Leaf]:
        ends = [self.up] if self.down is self.up else [self.up, self.down]
        return [Leaf(end, self.rate, *self.bounds) for end in ends]

    def params(self) -> Params:
        return range_params(self.fmt, self.given, self.up, self.down)
