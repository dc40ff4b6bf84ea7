"""Codes that stay while their parameters are learned: scales, float zero points, levels, codebooks.

w_hat = decode(codes, params),  parameters by a gradient; zero points in code units stay
"""

from dataclasses import replace

import torch
from jaxtyping import Float

from bitpress.formats import Kept, Packed, Params, Term
from bitpress.formats.grids.grid import Streamed
from bitpress.tuning.learned import Leaf, LearnedCodes, LearnedTerm, Start

__all__ = ["FixedCodes", "FixedKept", "learned_params"]


class FixedCodes(LearnedCodes):
    """Leaves are relative to the mean size of each parameter, so that one rate suits all of them.

    unit   the values for scales of 1, where a scale only multiplies what its code stands for: they are decoded once, not at every step
    """

    def __init__(self, start: Start, rate: float = 1.0) -> None:
        self.fmt, self.given, self.rate = start.fmt, dict(start.params), rate
        self.start = replace(
            start, target=start.target.new_empty(0, 0)
        )  # codes stay, whatever they stand for: it need not be held
        moving = [p.name for p in self.fmt.grid.params if p.kind != "code"]
        self.moved = {name: torch.zeros_like(self.given[name], requires_grad=True) for name in moving}
        tiny = torch.finfo(torch.float32).tiny
        self.units = {name: self.given[name].abs().mean().clamp_min(tiny) for name in moving}
        self.unit = self._of_unit_scale() if self._is_dear() else None

    def leaves(self) -> list[Leaf]:
        return [Leaf(t, self.rate) for t in self.moved.values()]

    def params(self) -> Params:
        return {name: t + self.moved[name] * self.units[name] if name in self.moved else t for name, t in self.given.items()}

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        params = self.stored_params()
        if self.unit is None:
            return self.fmt.decode(self.start.codes, params)
        return self._scaled(self.unit.float(), params["scale"])

    def _is_dear(self) -> bool:
        """Whether codes take long to decode, those of trellises and of several weights, to what one scale of a block multiplies."""
        grid, one = self.fmt.grid, self.fmt.grid.params[0]
        alone = len(grid.params) == 1 and (one.name, one.scope, one.shape) == ("scale", "block", ())
        return alone and (isinstance(grid, Streamed) or grid.span > 1)

    def _of_unit_scale(self) -> torch.Tensor | None:
        """Return the values for scales of 1, in float16 where that holds them, None where those times the scales are not what is decoded, to
        the bit."""
        scale = self.given["scale"]
        unit = self.fmt.decode(self.start.codes, {"scale": torch.ones_like(scale)})
        same = torch.equal(self._scaled(unit, scale), self.fmt.decode(self.start.codes, {"scale": scale}))
        half = unit.half()
        return None if not same else half if torch.equal(half.float(), unit) else unit

    def _scaled(self, unit: torch.Tensor, scale: torch.Tensor) -> Float[torch.Tensor, "out in"]:
        return unit * self.fmt.spread({"scale": scale}, (unit.shape[0], unit.shape[1]))["scale"]

    @torch.no_grad()
    def harden(self) -> Packed:
        return Packed.pack(self.fmt, self.start.codes, self.stored_params())


class FixedKept:
    """The codes of some columns or rows, at their places in a weight that is zero elsewhere."""

    def __init__(self, term: Kept, rate: float = 1.0) -> None:
        self.term, self.codes = term, _fixed(term.packed, rate)
        self.at = term.chosen()[0].nonzero()[:, 0]

    def leaves(self) -> list[Leaf]:
        return self.codes.leaves()

    def penalty(self, progress: float) -> None:
        return None

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        values = self.codes.weight(progress)
        whole = values.new_zeros(self.term.shape)
        return whole.index_copy(1 if self.term.axis == "columns" else 0, self.at, values)

    def harden(self) -> Kept:
        return Kept.place(self.codes.harden(), self.term.axis, self.term.chosen()[0])


def learned_params(term: Term, rate: float = 1.0) -> LearnedTerm | None:
    """Return a term whose codes stay and whose parameters are learned, None where it has no such parameters."""
    if isinstance(term, Kept) and term.parts == 1 and term.count and _moves(term.packed):
        return FixedKept(term, rate)
    return _fixed(term, rate) if isinstance(term, Packed) and term.parts == 1 and _moves(term) else None


def _fixed(term: Packed, rate: float) -> FixedCodes:
    return FixedCodes(Start.of(term, term.dequantize()), rate)


def _moves(term: Packed) -> bool:
    return any(p.kind != "code" for p in term.format.grid.params)
