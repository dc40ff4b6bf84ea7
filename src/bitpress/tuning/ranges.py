"""The ends of the range of every block as factors of those that a closed form chose."""

import torch

from bitpress.formats import Format
from bitpress.formats.grids.grid import Params
from bitpress.tuning.learned import Leaf

__all__ = ["LearnedRange", "has_two_ends", "range_params"]


def has_two_ends(params: Params) -> bool:
    """Whether both ends of a block's range can move apart: it has a zero point or a minimum beside the scale."""
    return "zero" in params or "min" in params


def range_params(fmt: Format, params: Params, up: torch.Tensor, down: torch.Tensor) -> Params:
    """Return parameters of integers whose range reaches `up` times as high and `down` times as low; with a scale alone, up counts.

    scale = (up high - down low) / top,   zero = -down low / scale,   high = (top - z) s,   low = -z s, or minus the minimum
    """
    scale, top = params["scale"], float((1 << fmt.grid.code_bits) - 1)
    if "min" in params:
        least = params["min"]
        return {**params, "scale": scale * up + least * (down - up) / top, "min": least * down}
    if "zero" not in params:
        return {**params, "scale": scale * up}
    zero = params["zero"]
    high, low = (top - zero) * up, zero * down
    steps = (high + low) / top  # the new scale in units of the old one
    safe = torch.where(steps == 0, 1.0, steps)
    return {**params, "scale": scale * steps, "zero": torch.where(steps == 0, zero, low / safe)}


class LearnedRange:
    """Two factors for every block (one where it has a scale alone), from 1, within bounds."""

    def __init__(self, fmt: Format, params: Params, *, low: float, high: float, rate: float = 1.0) -> None:
        self.fmt, self.given, self.bounds, self.rate = fmt, dict(params), (low, high), rate
        self.up = torch.ones_like(params["scale"], requires_grad=True)
        self.down = torch.ones_like(params["scale"], requires_grad=True) if has_two_ends(params) else self.up

    def leaves(self) -> list[Leaf]:
        ends = [self.up] if self.down is self.up else [self.up, self.down]
        return [Leaf(end, self.rate, *self.bounds) for end in ends]

    def params(self) -> Params:
        return range_params(self.fmt, self.given, self.up, self.down)
