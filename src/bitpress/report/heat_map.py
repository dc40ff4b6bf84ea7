"""The heat map of a report: blocks down, kinds of weights across, the error of each as the color of a cell."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bitpress.report.document import LayerRow

__all__ = ["STEPS", "Cell", "HeatMap", "draw_heat_map", "find_place"]

STEPS = 8
# The row of the weights that are in no block.
OUTSIDE = "outside"
# Maps whose errors are all below this are shown in parts per million.
SMALL = 0.002
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Cell:
    """The weights of one kind in one block (experts that are parameters of their own share a cell), the largest error first.

    `step` is the color, from 0 for the least errors of the map to STEPS - 1 for the largest.
    """

    weights: tuple[LayerRow, ...]
    step: int

    @property
    def error(self) -> float:
        return _mean_error(self.weights)

    @property
    def fell_back(self) -> bool:
        return any(row.fallbacks for row in self.weights)


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells by the block's name, None where a block has no weight of a kind; and the weights outside the blocks.

    `least` and `most` are the errors of the first and the last color; a few cells lie beyond them.
    """

    kinds: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    outside: tuple[Cell, ...]
    least: float
    most: float

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order in which they are shown."""
        return [*(cell for _, row in self.rows for cell in row if cell is not None), *self.outside]

    @property
    def unit(self) -> str:
        """What errors are shown in: per cent, or parts per million if all are small."""
        return "%" if self.most >= SMALL else "ppm"

    def told(self, error: float) -> str:
        """Return an error in this unit, with two digits: `.24`, `12`, `340`."""
        value = error * (100 if self.unit == "%" else 1e6)
        if value == 0 or not math.isfinite(value):
            return "0" if value == 0 else "inf"
        if 0.01 <= value < 10_000:
            return f"{value:.0f}" if value >= 100 else f"{value:.2g}".removeprefix("0")
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def find_place(name: str) -> tuple[str, str]:
    """Return the block and the kind of a weight: `model.layers.3.mlp.experts.7.up_proj` is in "3", of kind `mlp.experts.N.up_proj`."""
    found = _NUMBER.search(name)
    if found is None:
        return OUTSIDE, name
    inside = name[found.end() :].removeprefix(".")
    return found.group().removeprefix("."), _NUMBER.sub(".N", inside) or name


def draw_heat_map(layers: Sequence[LayerRow]) -> HeatMap:
    """Sort the weights of a report into a map. Colors follow the logarithm of the error between its 5 % and 95 % quantiles."""
    cells: dict[tuple[str, str], list[LayerRow]] = {}
    for row in layers:
        cells.setdefault(find_place(row.name), []).append(row)
    blocks = list(dict.fromkeys(block for block, _ in cells if block != OUTSIDE))
    kinds = list(dict.fromkeys(kind for block, kind in cells if block != OUTSIDE))
    ordered = {at: tuple(sorted(rows, key=lambda row: -row.error)) for at, rows in cells.items()}
    errors = [_mean_error(rows) for rows in ordered.values()]
    positive = sorted(error for error in errors if 0 < error < math.inf) or [0.0]
    last = len(positive) - 1
    least, most = positive[math.floor(0.05 * last)], positive[math.ceil(0.95 * last)]

    made = {at: Cell(rows, _step(_mean_error(rows), least, most)) for at, rows in ordered.items()}
    return HeatMap(
        kinds=tuple(kinds),
        rows=tuple((block, tuple(made.get((block, kind)) for kind in kinds)) for block in blocks),
        outside=tuple(cell for (block, _), cell in made.items() if block == OUTSIDE),
        least=least,
        most=most,
    )


def _mean_error(rows: Sequence[LayerRow]) -> float:
    return math.fsum(row.error for row in rows) / len(rows)


def _step(error: float, least: float, most: float) -> int:
    if not 0 < error < math.inf or most <= least:
        return STEPS - 1 if error == math.inf else 0
    share = math.log(error / least) / math.log(most / least)
    return min(max(math.floor(share * STEPS), 0), STEPS - 1)
