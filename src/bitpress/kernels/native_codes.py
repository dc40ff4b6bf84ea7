"""Codes in native memory: what native code is given for the codes of a grid.

A grid becomes one or several `Codes`. Native code knows these kinds (`native/engine/matrix.h`):

    whole    (code - zero) * scale, the zero a whole number or a float; or code * scale less a minimum of the block
    table    a level times the scale, of up to 8 bits, where the levels are near enough to multiples of one step: products with
             8-bit activations read those as bytes
    levels   any levels, and several tables of them that blocks choose among
    own      levels of the block's own
    halves   whole codes, and two that are half a step
    words    vectors of a book, or sums of one from each of several
    e8p      points of the E8 lattice, from 256 rows of magnitudes
    trellis  bits of a path down the column
    pairs    two neighbors: normal values, or an outlier beside a victim
    pyramid  numbers of points whose coordinates' magnitudes have one sum

and these ways to hold them:

    planes   of 8, 4, 2 and 1 bits
    trits    five codes below 3 in a byte, as the layout base3
    uneven   codes whose odd rows have a bit more

Grids of other kinds have no layout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bitpress.formats.format import Format
from bitpress.formats.grids.additive_book import AdditiveBook
from bitpress.formats.grids.codebook import LearnedBook
from bitpress.formats.grids.denormal_integer import DenormalInteger
from bitpress.formats.grids.float_zero import FloatZero
from bitpress.formats.grids.gaussian_mixture import GaussianMixture
from bitpress.formats.grids.grid import Grid, Params
from bitpress.formats.grids.integer import Integer
from bitpress.formats.grids.kmeans import KMeans
from bitpress.formats.grids.lattice import E8P
from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.minimum_integer import MinimumInteger
from bitpress.formats.grids.mixture import Mixture
from bitpress.formats.grids.outlier_pair import OutlierPair, PairTable
from bitpress.formats.grids.planes import Planes
from bitpress.formats.grids.pyramid import Pyramid
from bitpress.formats.grids.trellis import Trellis
from bitpress.formats.terms.packed import Packed

__all__ = ["Codes", "plan_codes"]

# Bytes that approximate levels lie between these, so that no sum of products of two bytes overflows.
BYTE_REACH = 127
OFFSET = 128
# A table of up to this many levels is read in bytes even where those are not exact.
MOST_APPROXIMATED = 16
# Most bits of a code of a fixed book: its words are listed.
MOST_LISTED = 12

Make = Callable[[Packed, Params], dict[str, Any]]
Recode = Callable[[Packed], torch.Tensor]


@dataclass(frozen=True)
class Codes:
    """One matrix of codes. `take` returns the codes of a term, `meaning` what native code is told of them beside their bits.

    `less` is the parameter that is taken away: from the codes with `less_of_codes`, otherwise from the weights.
    """

    bits: int
    zero: int = 0
    gain: float = 1.0
    levels: tuple[float, ...] | None = None
    take: Recode = Packed.unpack_codes
    meaning: Make | None = None
    plane: int = 0
    planes: int = 1
    packing: str = "planes"
    less: str | None = None
    less_of_codes: bool = False

    def table(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the bytes of the levels, the levels themselves and the step of the bytes."""
        assert self.levels is not None
        even = _even_steps(self.levels) if len(self.levels) > MOST_APPROXIMATED else None
        whole, step = even if even is not None else _nearest_bytes(self.levels)
        count = max(16, 1 << self.bits)
        table, levels = np.full(count, OFFSET, np.uint8), np.zeros(count, np.float32)
        table[: len(whole)] = whole + OFFSET
        levels[: len(whole)] = np.array(self.levels, np.float32)
        return table, levels, step


def plan_codes(fmt: Format) -> list[Codes]:
    """Return how the codes of a format become native ones; nothing if they cannot."""
    plans = PLANS.get(type(fmt.grid), _listed)(fmt.grid)
    return [replace(plan, packing="trits") for plan in plans] if fmt.layout == "base3" else plans


def _integer(grid: Any) -> list[Codes]:
    return [Codes(grid.bits, zero=0 if grid.zero else 1 << (grid.bits - 1))]


def _minimum(grid: Any) -> list[Codes]:
    return [Codes(grid.bits, less="min")]


def _float_zero(grid: Any) -> list[Codes]:
    return [Codes(grid.bits, less="zero", less_of_codes=True)]


def _planes(grid: Any) -> list[Codes]:
    plans, below = [], 1
    for index, digits in enumerate(grid.digits):
        count = len(digits)

        def take(term: Packed, below: int = below, count: int = count) -> torch.Tensor:
            return (term.unpack_codes() // below % count).to(torch.uint8)

        levels = tuple(float(d) for d in digits)
        plans.append(Codes((count - 1).bit_length(), levels=levels, take=take, plane=index, planes=len(grid.digits)))
        below *= count
    return plans


def _levels(grid: Any) -> list[Codes]:
    return _by_level(_valid(grid.levels), grid.code_bits) if grid.code_bits <= 8 else []


def _by_level(levels: tuple[float, ...], bits: int) -> list[Codes]:
    if len(levels) <= MOST_APPROXIMATED:
        return [Codes(bits, levels=levels)]
    even = _even_steps(levels)
    if even is None:
        return [Codes(bits, meaning=lambda term, params: _tables([levels], bits))]
    whole, step = even
    zero = max(0, -int(whole.min()))
    if (int(whole.max()) + zero).bit_length() > bits:
        return [Codes(bits, levels=levels)]
    # Whole numbers in as many bits by other codes: mxint8 and the like.
    table = torch.tensor(whole + zero).to(torch.uint8)
    return [Codes(bits, zero=zero, gain=step, take=lambda term: table[term.unpack_codes().int()])]


def _even_steps(levels: tuple[float, ...]) -> tuple[np.ndarray, float] | None:
    """Return levels as multiples of a step that fit a byte, and the step; None if there is no such step."""
    values = np.array(levels)
    smallest = float(np.abs(values[values != 0]).min())
    for divisor in (1, 2, 3):
        whole = values / (smallest / divisor)
        if (whole == np.rint(whole)).all() and whole.min() >= -OFFSET and whole.max() <= BYTE_REACH:
            return whole, smallest / divisor
    return None


def _mixture(grid: Any) -> list[Codes]:
    def meaning(term: Packed, params: Params) -> dict[str, Any]:
        tables = _tables([_valid(table.levels) for table in grid.tables], grid.code_bits)
        return tables | {"which": params["which"].to(torch.uint8).flatten().numpy()}

    return [Codes(grid.code_bits, meaning=meaning)]


def _own(grid: Any) -> list[Codes]:
    return [
        Codes(grid.code_bits, meaning=lambda term, params: {"kind": "own", "span": 1, "own": _halves(term.tensors["levels"])})
    ]


def _denormal(grid: Any) -> list[Codes]:
    if not grid.zero:
        return _listed(grid)
    return [Codes(grid.bits, meaning=lambda term, params: {"kind": "halves", "span": 1})]


def _learned(grid: Any) -> list[Codes]:
    return [Codes(grid.code_bits, meaning=lambda term, params: _book(grid.span, grid.bits, _halves(term.tensors["words"])))]


def _additive(grid: Any) -> list[Codes]:
    def meaning(term: Packed, params: Params) -> dict[str, Any]:
        return _book(grid.span, grid.bits, _halves(term.tensors["words"]), grid.books)

    return [Codes(grid.code_bits, meaning=meaning)]


def _trellis(grid: Any) -> list[Codes]:
    shifts = grid.constants.shifts
    path = [grid.state_bits, shifts[0], shifts[-1], grid.constants.multiplier, *grid.constants.polynomial]

    def take(term: Packed) -> torch.Tensor:
        added: torch.Tensor = grid.added(term.unpack_codes().T)
        return added.T.contiguous()

    return [
        Codes(
            max(shifts),
            take=take,
            packing="planes" if shifts[0] == shifts[-1] else "uneven",
            meaning=lambda term, params: {"kind": "trellis", "span": 1, "path": np.array(path, np.int32)},
        )
    ]


def _pairs(grid: Any) -> list[Codes]:
    bits = grid.tables[0].bits
    if len(grid.tables) == 1 and grid.code_bits <= MOST_LISTED:
        return _listed(grid)

    def take(term: Packed) -> torch.Tensor:
        codes = term.unpack_codes()
        return torch.stack([codes & (1 << bits) - 1, codes >> bits], -1).flatten(1).to(torch.uint8)

    def meaning(term: Packed, params: Params) -> dict[str, Any]:
        levels = np.array([_signed_levels(table) for table in grid.tables], np.float32).flatten()
        which = {"which": params["which"].to(torch.uint8).flatten().numpy()} if "which" in params else {}
        return {"kind": "pairs", "span": 1, "tables": len(grid.tables), "levels": levels} | which

    return [Codes(bits, take=take, meaning=meaning)]


def _signed_levels(table: PairTable) -> list[list[float]]:
    """Return the value of every digit, beside a normal one and beside a victim; 0 where it has none."""
    ranks = range(-table.zero, table.zero + 2)
    beside_normal, beside_victim = (
        [math.copysign(values[abs(r)], r) if abs(r) < len(values) else 0.0 for r in ranks]
        for values in (table.normal, (0.0, *table.outlier))
    )
    return [beside_normal, beside_victim]


def _pyramid(grid: Any) -> list[Codes]:
    if grid.code_bits <= MOST_LISTED:
        return _listed(grid)
    return [Codes(grid.code_bits, meaning=lambda term, params: {"kind": "pyramid", "span": grid.span, "pulses": grid.pulses})]


def _lattice(grid: Any) -> list[Codes]:
    if grid != E8P:
        return _listed(grid)
    # Codes 0 to 255 of every row: the first has no sign, so its magnitudes are the word less a quarter.
    rows = grid.codewords(torch.device("cpu"))[::256] - 0.25
    points = (rows * 4).to(torch.int8).contiguous().view(torch.uint8).flatten().numpy()
    return [Codes(16, meaning=lambda term, params: {"kind": "e8p", "span": 8, "points": points})]


def _listed(grid: Grid) -> list[Codes]:
    """Return the codes of a grid that has nothing but scales, by the values of all codes at the scale 1."""
    if [p.kind for p in grid.params] != ["scale"] or grid.code_bits > MOST_LISTED:
        return []
    values = _words(grid)
    if grid.span == 1:
        return _by_level(tuple(values.flatten().tolist()), grid.code_bits)
    half = values.half()
    words = _halves(half) if torch.equal(half.float(), values) else values.contiguous().flatten().numpy()
    return [Codes(grid.code_bits, meaning=lambda term, params: _book(grid.span, grid.code_bits, words))]


def _words(grid: Grid) -> torch.Tensor:
    codes = torch.arange(1 << grid.code_bits).clamp(max=_last_code(grid))
    codes = codes.to(torch.uint8 if grid.code_bits <= 8 else torch.int32)
    values = grid.decode(codes[:, None], {"scale": torch.ones(1, 1)}).reshape(len(codes), grid.span)
    return torch.where(values.isnan(), 0.0, values)


def _last_code(grid: Grid) -> int:
    """Return the highest code that can be decoded. Grids with invalid codes in between (olive4) decode all of them."""
    return (1 << grid.code_bits) - 1 if grid.name.startswith("olive") else grid.num_codes - 1


def _book(span: int, word_bits: int, words: np.ndarray, books: int = 1) -> dict[str, Any]:
    name = "halves" if words.dtype == np.uint16 else "words"
    return {"kind": "words", "span": span, "books": books, "word_bits": word_bits, name: words}


def _tables(tables: list[tuple[float, ...]], bits: int) -> dict[str, Any]:
    levels = np.zeros((len(tables), 1 << bits), np.float32)
    for row, table in zip(levels, tables, strict=True):
        row[: len(table)] = table
    return {"kind": "levels", "span": 1, "tables": len(tables), "levels": levels.flatten()}


def _halves(values: torch.Tensor) -> np.ndarray:
    made: np.ndarray = values.contiguous().view(torch.uint16).flatten().numpy()
    return made


def _valid(levels: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(0.0 if level != level else level for level in levels)


def _nearest_bytes(levels: tuple[float, ...]) -> tuple[np.ndarray, float]:
    """Return a step and the whole number for every level whose multiple of the step is nearest to it; exact if the levels are multiples."""
    values = np.array(levels)
    most = float(np.abs(values).max())
    best: tuple[float, np.ndarray, float] | None = None
    for top in range(1, BYTE_REACH + 1):
        whole = np.rint(values / most * top)
        error = float(np.abs(whole * (most / top) - values).max()) / most
        error = 0.0 if error < 1e-9 else error
        if best is None or error < best[0]:
            best = (error, whole, most / top)
    assert best is not None
    return best[1], best[2]


PLANS: dict[type, Callable[[Any], list[Codes]]] = {
    Integer: _integer,
    MinimumInteger: _minimum,
    FloatZero: _float_zero,
    Planes: _planes,
    Levels: _levels,
    Mixture: _mixture,
    KMeans: _own,
    GaussianMixture: _own,
    DenormalInteger: _denormal,
    LearnedBook: _learned,
    AdditiveBook: _additive,
    Trellis: _trellis,
    OutlierPair: _pairs,
    Pyramid: _pyramid,
    type(E8P): _lattice,
}
