"""Levels: any fixed list of numbers times a scale. Minifloats, normal floats, powers, logarithms, ternary and binary are rows of it.

    w_hat = levels[code] * scale

A code whose level is NaN is invalid: it is never chosen, and refused in a file. A value takes the nearest level, and at a midpoint the
level with the even code, which is round-half-to-even for minifloats. In a table with a negative zero, negative values that round to
zero become negative zero, as in hardware casts.

How `fit` chooses the scale of a block (`rule`):

    absmax    the smallest that clips nothing
    largest   the largest magnitude over the largest level's: clips weights on the side whose levels end earlier
    mean      the mean magnitude over the mean positive level: least squares for signs, the usual choice for ternary networks
    median    the median magnitude instead of the mean
    rms       the root mean square: for levels designed for weights of variance 1
    ocp       2^(floor(log2(largest magnitude)) - floor(log2(largest level))), as in OCP MX; larger values are clipped
              unless a search finds the next power of two better
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native
from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.layouts.dense import code_dtype
from bitpress.formats.scale_store import Outer, ScaleStore, first_trials

__all__ = ["Levels", "Rule", "root_mean_square", "search_tables"]

# Number of blocks whose scales are tried together; each ratio needs that many numbers.
SEARCHED_TOGETHER = 1 << 16

Rule = Literal["absmax", "largest", "mean", "median", "rms", "ocp"]


@dataclass(frozen=True)
class Levels:
    name: str
    levels: tuple[float, ...]
    rule: Rule = "absmax"
    usual_scale: str = "fp16"

    def __post_init__(self) -> None:
        real = [level for level in self.levels if not math.isnan(level)]
        if len(real) < 2 or any(math.isinf(level) for level in real) or max(real) <= 0 or len(self.levels) > 1 << 16:
            raise FormatError(f"{self.name}: a grid needs 2 to 65,536 finite levels, at least one of them positive.")

    @property
    def num_codes(self) -> int:
        return sum(not math.isnan(level) for level in self.levels)

    @property
    def code_bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def span(self) -> int:
        return 1

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose a scale for every block by the grid's rule; a block of zeros gets 0."""
        real = [level for level in self.levels if not math.isnan(level)]
        top, bottom = max(real), -min(real)
        if self.rule in ("absmax", "largest", "ocp"):
            high = blocks.amax(-1, keepdim=True).clamp(min=0.0)
            low = -blocks.amin(-1, keepdim=True).clamp(max=0.0)
            if self.rule == "absmax":
                # A grid without negative levels cannot reach negative weights.
                return {"scale": torch.maximum(high / top, low / bottom) if bottom > 0 else high / top}
            if self.rule == "largest":
                return {"scale": torch.maximum(high, low) / max(top, bottom)}
            exponent = torch.frexp(torch.maximum(high, low))[1] - 1 - math.floor(math.log2(top))
            scale = torch.ldexp(torch.ones_like(high, dtype=torch.float64), exponent).float()
            return {"scale": torch.where(torch.maximum(high, low) > 0, scale, 0.0)}
        if self.rule == "rms":
            return {"scale": root_mean_square(blocks)}
        if self.rule == "median":
            return {"scale": blocks.abs().median(-1, keepdim=True).values / self._positive_mean}
        if importance is None:
            return {"scale": blocks.abs().mean(-1, keepdim=True) / self._positive_mean}
        total = importance.sum(-1, keepdim=True)
        mean = (blocks.abs() * importance).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return {"scale": mean / self._positive_mean}

    @property
    def table(self) -> native.LevelTable | None:
        """See `Tabled`."""
        return _native_table(self.levels) if self.code_bits <= 8 else None

    def search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        importance: Float[torch.Tensor, "blocks n"] | None,
        shrink: Sequence[float],
        store: ScaleStore,
        outer: Outer,
    ) -> Params | None:
        """See `OwnSearch`. Return None for rules that need more of a block than its range."""
        table = self.table
        if (
            table is None
            or self.rule not in ("absmax", "largest", "ocp")
            or blocks.device.type != "cpu"
            or not native.available()
        ):
            return None
        found = []
        for start in range(0, len(blocks), SEARCHED_TOGETHER):
            here = slice(start, start + SEARCHED_TOGETHER)
            part, own = blocks[here], {name: t[here] for name, t in outer.items()}
            ends = torch.cat([part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)], dim=-1)
            trials = torch.stack([scale[:, 0] for scale in self.trial_scales(ends, None, shrink, store, own)])
            weights = None if importance is None else importance[here]
            found.append(native.search_scales(part, weights, trials, table) if len(trials) > 1 else trials.T)
        return {"scale": torch.cat(found)}

    def trial_scales(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        importance: torch.Tensor | None,
        shrink: Sequence[float],
        store: ScaleStore,
        outer: Outer,
    ) -> list[Float[torch.Tensor, "blocks 1"]]:
        """Return the stored scales that a search tries, the full range's first."""
        full = self.fit(blocks * shrink[0], importance)["scale"]
        trials = first_trials(store, full, outer, self.code_bits, searched=len(shrink) > 1)
        return trials + [store.round(self.fit(blocks * ratio, importance)["scale"], outer) for ratio in shrink[1:]]

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        scale, table = params["scale"], self.table
        if table is not None and native.serves(values, scale):
            return native.encode_levels(values, scale, table)
        boundaries, codes, negative_zero = search_tables(self.levels, values.device)
        scaled = (values / torch.where(scale == 0, 1.0, scale)).contiguous()
        chosen = codes[torch.bucketize(scaled, boundaries)]
        if negative_zero is not None:
            zero, signed = negative_zero
            chosen = torch.where((chosen == zero) & torch.signbit(scaled), signed, chosen)
        return chosen.to(code_dtype(self.code_bits))

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        if self.code_bits <= 8 and native.serves(codes, params["scale"]):
            return native.decode_levels(codes, params["scale"], _byte_table(self.levels))
        return _level_table(self.levels, codes.device)[codes.int()] * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for a code without a level."""
        if bool((codes.int() >= len(self.levels)).any()):
            raise FormatError(f"{self.name}: a code is {int(codes.max())}, but there are only {len(self.levels)} levels.")
        if not bool(torch.isfinite(_level_table(self.levels, codes.device)[codes.int()]).all()):
            raise FormatError(f"{self.name}: a code stands for NaN; the file is damaged.")

    @property
    def _positive_mean(self) -> float:
        positive = [level for level in self.levels if level > 0]
        return math.fsum(positive) / len(positive)


def root_mean_square(blocks: Float[torch.Tensor, "blocks n"]) -> Float[torch.Tensor, "blocks 1"]:
    """Return the root mean square of every block, scaled by its largest magnitude to avoid overflow and underflow."""
    largest = blocks.abs().amax(-1, keepdim=True)
    return (blocks / torch.where(largest > 0, largest, 1.0)).square_().mean(-1, keepdim=True).sqrt_().mul_(largest)


@cache
def _level_table(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


@cache
def _byte_table(levels: tuple[float, ...]) -> torch.Tensor:
    """Return the levels of all 256 bytes, NaN for bytes without a level."""
    return torch.tensor((*levels, *(math.nan for _ in range(256 - len(levels)))), dtype=torch.float32)


@cache
def _native_table(levels: tuple[float, ...]) -> native.LevelTable:
    boundaries, codes, negative_zero = search_tables(levels, torch.device("cpu"))
    rising = _level_table(levels, torch.device("cpu"))[codes]
    return native.LevelTable(boundaries, rising, codes.to(torch.uint8), negative_zero)


@cache
def search_tables(levels: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int] | None]:
    """Return the boundaries between neighbouring levels, the code on each side, and the codes of zero and negative zero.

    `bucketize` puts a value at a boundary into the lower bin, so a boundary below an even code is one float lower.
    """
    table: dict[float, int] = {}
    zero, negative_zero = None, None
    for code, level in enumerate(levels):
        if level == 0 and math.copysign(1.0, level) < 0:
            negative_zero = code
        elif not math.isnan(level) and level not in table:
            table[level] = code
            zero = code if level == 0 else zero
    if zero is None and negative_zero is not None:
        table[0.0], negative_zero = negative_zero, None
    ordered = sorted(table)
    codes = [table[level] for level in ordered]
    middles = []
    for low, high, code in zip(ordered, ordered[1:], codes[1:], strict=False):
        middle = torch.tensor((low + high) / 2, dtype=torch.float32)
        middles.append(torch.nextafter(middle, torch.tensor(-math.inf)) if code % 2 == 0 else middle)
    signed = (zero, negative_zero) if zero is not None and negative_zero is not None else None
    return torch.stack(middles).to(device), torch.tensor(codes, device=device), signed
