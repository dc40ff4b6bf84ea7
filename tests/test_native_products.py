"""Products of the native engine against decoded weights in float64, within bounds that are derived here from what the engine rounds.

float activations   sums in float32; what `NativeLayout.expanded` names is rounded to fp16
codes that are decoded to floats (`Linear.reads`)   exact up to four rows; more rows: as uncompressed weights, without their fp16
codes that are decoded to bytes                     a word or level is the nearest of 127 steps of the largest; else as other codes
8-bit activations   besides, up to 4 rows are rounded in steps of max |x| / 8064 in pieces of a group, at most 128 columns wide; levels
                    of a table that are no whole multiples of one step become the nearest of 127 of them.
                    More rows: in steps of max |x| / 127 in pieces of at most 128 columns, what is far above the row's mean left
                    out and multiplied in float; bytes stand for the weights, whose groups below 64 columns share a scale.
                    Codes beside a minimum or a float zero are rounded as uncompressed weights there. On tiles of bf16: rows and weights are rounded to 8 bits behind the first one, and nothing else
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress import native
from bitpress.formats import CompressedWeight, parse_format
from bitpress.formats.format import Format
from bitpress.formats.grids.float_zero import FloatZero
from bitpress.formats.grids.integer import Integer
from bitpress.formats.grids.levels import Levels
from bitpress.formats.grids.minimum_integer import MinimumInteger
from bitpress.formats.grids.planes import Planes
from bitpress.formats.listing import usual_formats
from bitpress.formats.maps.map import Chain, Map, Permutation, Scale
from bitpress.formats.maps.rotations import Hadamard, Kronecker
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.table import find_grid
from bitpress.formats.terms.dfloat11 import dfloat11
from bitpress.formats.terms.kept import Kept
from bitpress.formats.terms.low_rank import LowRank, low_rank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sign_low_rank import sign_low_rank
from bitpress.formats.terms.sparse import Sparse, sparse
from bitpress.kernels.native_layout import NativeLayout, lay_out, lay_out_matrix, reason_to_expand

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

# "emulated" has the products of the path amx, with the instructions on tiles written out.
PATHS: list[str] = [*native.library().paths(), "emulated"] if native.available() else []
IN_HALVES = ("amx", "emulated")
EPS = 2.0**-23
FEW_ROWS = 4
PIECE, SEGMENT = 128, 128
DIGITS = 8064
APART, CLOSER = 5.0, 0.5
# Half a unit for the rounding, and for the fixed-point factor half of one of its steps of 2^-15 on a value below 2^8, or one whole
# step on one below 2^7 where the factor itself is one too large for its 16 bits.
HALF_UNIT = 0.5 + 2.0**-8 + 2.0**-8
GUARD = 64


# ---- the bound ----


@dataclass(frozen=True)
class Codes:
    """A matrix of codes as the engine holds it: w [out, in] is a whole number up to `reach` times `step`, a step for every weight.

    missed   what a level may differ from that, in steps
    """

    w: torch.Tensor
    step: torch.Tensor
    group: int
    reach: int
    missed: float = 0.0


def codes_of(term: Packed) -> Iterator[Codes]:
    """Take a term apart into the matrices of codes that add up to it."""
    rows, cols = term.format.block.resolve(term.shape, 1)
    codes, params = term.unpack()
    grid = term.format.grid

    def each(values: torch.Tensor) -> torch.Tensor:
        return values.double().repeat_interleave(rows, 0).repeat_interleave(cols, 1)

    w = term.dequantize().double()
    if isinstance(grid, Integer):
        reach = grid.top if grid.zero else 1 << (grid.bits - 1)
        yield Codes(w, each(params["scale"]), cols, reach)
    elif isinstance(grid, Planes):
        below = 1
        for k, digits in enumerate(grid.digits):
            digit = torch.tensor(digits, dtype=torch.float64)[codes.long() // below % len(digits)]
            scale = each(params["scale"][..., k])
            yield Codes(scale * digit, scale, cols, 1)
            below *= len(digits)
    else:
        if isinstance(grid, Levels):
            levels = [0.0 if level != level else level for level in grid.levels]
        else:  # a grid with nothing but scales
            every = torch.arange(grid.num_codes, dtype=torch.uint8)[:, None]
            levels = grid.decode(every, {"scale": torch.ones(1, 1)}).flatten().tolist()
        if grid.code_bits <= 4:
            step, reach, missed = nearest_steps(levels)
        else:
            step, reach, missed = even_step(levels), 128, 0.0
        yield Codes(w, each(params["scale"]).abs() * step, cols, reach, missed)


def lowered(term: Packed) -> torch.Tensor | None:
    """Return the size of what a weight is the difference of, its code and what is taken away; None if that is a whole number."""
    rows, cols = term.format.block.resolve(term.shape, 1)
    if not isinstance(term.format.grid, (MinimumInteger, FloatZero)):
        return None
    codes, params = term.unpack()
    less = params["min"] if "min" in params else params["zero"] * params["scale"]
    scale, less = (
        values.double().abs().repeat_interleave(rows, 0).repeat_interleave(cols, 1) for values in (params["scale"], less)
    )
    return codes.double() * scale + less


def even_step(levels: list[float]) -> float:
    """Return the largest step of which all levels are multiples, out of a half, a third or the whole of the smallest one."""
    smallest = min(abs(level) for level in levels if level)
    return next(smallest / d for d in (1, 2, 3) if all((level / (smallest / d)).is_integer() for level in levels))


def nearest_steps(levels: list[float]) -> tuple[float, int, float]:
    """Return the step whose multiples are nearest to levels, the largest multiple and the largest difference in steps."""
    values = np.array(levels)
    most = np.abs(values).max()
    missed = {top: np.abs(np.rint(values / most * top) - values / most * top).max() / top for top in range(1, 128)}
    top = min(missed, key=lambda t: (0.0 if missed[t] < 1e-9 else missed[t], t))
    return most / top, top, missed[top] * top


def highest_near(values: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """Return the highest value that a piece of `width` columns around each column of a group can hold: an upper bound."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % group), value=-torch.inf).reshape(1, -1, group)
    near = torch.nn.functional.max_pool1d(padded, 2 * width - 1, 1, width - 1)
    return near.reshape(rows, -1)[:, :columns]


def half_steps(values: torch.Tensor, group: int, width: int, steps: int = 127) -> torch.Tensor:
    """Return the bound of a piece's rounding error: half a step of its largest magnitude / `steps`.

    The step and its reciprocal are rounded to float32 themselves, which counts for all the steps.
    """
    return highest_near(values.abs(), group, width) / (2 * steps) * (1 + 4 * steps * EPS)


def half_steps_beside(x: torch.Tensor) -> torch.Tensor:
    """Return the bound of the error of many rows: half a step of the largest magnitude that is not an outlier.

    A magnitude above 5 times the mean stands apart, and above 5 times the mean of the others, or half of that where many do; of a
    quarter of the columns and 8 at most. The mean is summed in float32, so a value may fall on either side of a bound that is so much larger.
    """
    size, most = x.abs(), torch.full((x.shape[0], 1), torch.inf, dtype=torch.float64)
    for _ in range(2):
        most = APART * torch.where(size > most, 0.0, size).mean(1, keepdim=True) * (1 + x.shape[1] * EPS)
    crowded = (size > most * CLOSER * (1 - 2 * x.shape[1] * EPS)).sum(1, keepdim=True) > x.shape[1] // 4 + 8
    return half_steps(torch.where(crowded, size, torch.minimum(size, most)), x.shape[1], SEGMENT)


def to_halves(values: torch.Tensor) -> torch.Tensor:
    """Return the bound of the rounding error in bf16: half a unit of 8 bits, or of the smallest normal number."""
    return values.abs() * 2.0**-8 + 2.0**-126


def fp16_step(w: torch.Tensor, gain: torch.Tensor | float) -> torch.Tensor:
    """Return the bound of the rounding error of w / gain in fp16: half a unit of 11 bits, or half the smallest number."""
    return w.abs() * 2.0**-11 + 2.0**-25 * gain


def missed_by_bytes(term: Packed) -> torch.Tensor:
    """Return the bound of what a weight and its byte differ by: half a step of 127 of the largest level or word, times the scale."""
    rows, cols = term.format.block.resolve(term.shape, term.format.grid.span)
    params, grid = term.unpack_params(), term.format.grid
    down, across = term.format.block_grid(term.shape)
    if isinstance(grid, Integer):  # small groups
        return torch.zeros(term.shape, dtype=torch.float64)
    if "levels" in params:
        most = params["levels"].abs().amax(-1)
    else:
        scale = params["scale"].reshape(down, across).abs()
        if "words" in params:
            words = params["words"].reshape(-1, *params["words"].shape[-2:])
            most = scale * sum(float(book.abs().max()) for book in words)
        else:
            count = 256 if grid.name == "olive4" else grid.num_codes  # its invalid codes are in between
            codes = torch.arange(count).to(torch.uint8 if grid.code_bits <= 8 else torch.int32)[:, None]
            tables = range(1 << next((p.bits for p in grid.params if p.name == "which"), 0))
            values = [grid.decode(codes, {"scale": torch.ones(1, 1), "which": torch.full((1, 1), float(t))}) for t in tables]
            most = scale * torch.cat(values).nan_to_num().abs().max()
    pieces = len(params["words"]) if "words" in params and params["words"].ndim == 3 else 1
    return (most.double() * pieces / 254 * (1 + 300 * EPS)).repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def missed_between_scales(term: Packed, w: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the bound of what tiles of bytes add where groups share a segment: those below 64 columns, or that do not fill lines."""
    group = term.format.block.resolve(term.shape, term.format.grid.span)[1]
    return half_steps(w.abs() + near, w.shape[1], SEGMENT) if group % 64 and group < w.shape[1] else torch.zeros_like(w)


def parts_of(term: Packed, w: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices of codes that a term is the sum of."""
    return [codes.w for codes in codes_of(term)] if isinstance(term.format.grid, Planes) else [w]


def is_expanded(term: Any, weight: CompressedWeight, strips: NativeLayout) -> bool:
    if isinstance(term, (LowRank, Sparse)) and getattr(term, "parts", 1) == 1:
        return term is not next(first for first in weight.terms if isinstance(first, type(term)))  # one of a kind has a place
    kind = term.format.name if isinstance(term, Packed) else term.kind
    return any(reason.startswith(kind) for reason in strips.expanded)


def bound(
    weight: CompressedWeight, strips: NativeLayout, x: torch.Tensor, bias: torch.Tensor, in_bytes: bool, in_halves: bool = False
) -> torch.Tensor:
    """Return the bound of a product's error, [rows, out]: the rounding of every part times its factor."""
    many = x.shape[0] > FEW_ROWS
    error = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    size = bias.double().abs().expand_as(error).clone()  # of all that is added up
    rank = 0

    def add(x: torch.Tensor, dx: torch.Tensor, w: torch.Tensor, dw: torch.Tensor) -> None:
        nonlocal error, size
        error += dx @ (w.abs() + dw).T + x.abs() @ dw.T
        size += (x.abs() + dx) @ (w.abs() + dw).T

    def add_dense(x: torch.Tensor, w: torch.Tensor, dw: torch.Tensor) -> None:
        dx = torch.zeros_like(x)
        if in_bytes and many:
            if in_halves:
                dx, dw = to_halves(x), dw + to_halves(w.abs() + dw)
            else:
                dx, dw = half_steps_beside(x), dw + half_steps(w.abs() + dw, x.shape[1], SEGMENT)
        add(x, dx, w, dw)

    x = x.double()
    if weight.output_map is not None:
        before = CompressedWeight(weight.terms, weight.input_map)
        y, moved = mapped(x @ before.dequantize().double().T, weight.output_map)
        inner = bound(before, strips, x, torch.zeros_like(bias), in_bytes, in_halves)
        turned = weight.output_map.apply(torch.eye(weight.shape[0], dtype=torch.float64)).abs()
        return inner @ turned + moved * 2 + 2 * EPS * (y.abs() + bias.double().abs())
    if weight.input_map is not None:
        x, moved = mapped(x, weight.input_map)
        w = sum((term.dequantize().double().abs() for term in weight.terms), torch.zeros(weight.shape).double())
        error += moved @ w.T
        x = x.sign() * (x.abs() + moved)  # what follows is about sizes only
    reads = iter(strips.linear.reads)
    expanded = [term.dequantize() for term in weight.terms if is_expanded(term, weight, strips)]
    if expanded:
        w = sum(expanded, torch.zeros(weight.shape)).double()
        add_dense(x, w, fp16_step(w, w.abs().amax(1, keepdim=True)))
    whole = x
    for term in weight.terms:
        # A term of some columns multiplies those of the input alone.
        term, x = (term.packed, whole[:, term.chosen()[0]]) if isinstance(term, Kept) else (term, whole)
        w = term.dequantize().double()
        if is_expanded(term, weight, strips):
            continue
        how = {next(reads) for _ in parts_of(term, w)} if isinstance(term, Packed) else set()
        if isinstance(term, Packed) and (sizes := lowered(term)) is not None:
            size += x.abs() @ sizes.T
            if in_bytes and not many and how != {"floats"}:
                group = x.shape[1] if how == {"bytes"} else term.format.block.resolve(term.shape, 1)[1]
                add(x, half_steps(x, group, PIECE, DIGITS), w, torch.zeros_like(w))
            else:
                add_dense(x, w, 2 * EPS * sizes)
        elif how == {"floats"} or (how == {"bytes"} and (not in_bytes or (many and in_halves))):
            for part in parts_of(term, w):
                add_dense(x, part, 2 * EPS * part.abs())
        elif how == {"bytes"}:
            for part in parts_of(term, w):
                near = torch.zeros_like(part) if isinstance(term.format.grid, Planes) else missed_by_bytes(term)
                if many:
                    add(x, half_steps_beside(x), part, near + missed_between_scales(term, part, near))
                else:
                    add(x, half_steps(x, x.shape[1], PIECE, DIGITS), part, near)
        elif isinstance(term, LowRank):
            rank = term.rank
            a, b = (factor.double() for factor in term.factors())
            da, db = (fp16_step(f, 1.0) if "a.codes" in term.tensors else torch.zeros_like(f) for f in (a, b))
            inner = x.abs() @ (b.abs() + db).T
            error += (x.abs() @ db.T) @ (a.abs() + da).T + inner @ da.T
            size += inner @ (a.abs() + da).T
        elif isinstance(term, Sparse) or not in_bytes:
            for part in [w] if isinstance(term, Sparse) else [codes.w for codes in codes_of(term)]:
                size += x.abs() @ part.abs().T
        else:
            for codes in codes_of(term):
                missed = codes.missed * codes.step
                if many and in_halves:
                    add(x, to_halves(x), codes.w, to_halves(codes.w))
                elif many:
                    add(x, half_steps_beside(x), codes.w, missed + missed_in_tiles(codes))
                else:
                    add(x, half_steps(x, codes.group, PIECE, DIGITS), codes.w, missed)
    # A product is rounded once for every addition behind it: those of its columns, of the inner ones of a low-rank pair, and a
    # few scales, gains and terms, each in float32 and each twice where the path has no fused multiply-add.
    return error + (whole.shape[1] + rank + 16) * EPS * size


def mapped(x: torch.Tensor, change: Map) -> tuple[torch.Tensor, torch.Tensor]:
    """Return T x and the bound of its error in float32: a rounding for every addition and multiplication of a value, and of its factors."""
    size, additions = x.abs(), 0
    for part in change.maps if isinstance(change, Chain) else (change,):
        x = part.apply(x)
        # T' applied to the unit vectors gives the rows of T.
        size = size @ part.apply_transposed(torch.eye(x.shape[1], dtype=torch.float64)).abs().T
        if isinstance(part, Scale):
            additions += 2
        elif isinstance(part, (Hadamard, Kronecker)):
            additions += sum(factors_of(part)) + 4
    return x, additions * EPS * size


def factors_of(change: Hadamard | Kronecker) -> tuple[int, int]:
    if isinstance(change, Kronecker):
        return change.left.shape[0], change.right.shape[0]
    return change.core, change.block // change.core


def missed_in_tiles(codes: Codes) -> torch.Tensor:
    """Return the bound of the error of weights as bytes of a segment: 0 if the segment has one scale and its values fit.

    Groups of up to 32 columns share a segment of 64 at most.
    """
    if codes.group > 32 and codes.reach <= 127:
        return torch.zeros_like(codes.w)
    top, low = (s * highest_near(s * codes.step, codes.w.shape[1], SEGMENT) for s in (1, -1))
    most = 127 // codes.reach if codes.reach <= 127 else 127 / codes.reach
    exact = (top == low) & (codes.reach <= 127)
    return torch.where(exact, 0.0, HALF_UNIT * top / most)


# ---- products ----


@functools.cache
def multiplier(path: str, threads: int = 1) -> Any:
    return native.library().Multiplier(threads, path)


def product(strips: NativeLayout, x: torch.Tensor, path: str, in_bytes: bool, threads: int = 1) -> torch.Tensor:
    """Multiply into poisoned memory between two guards."""
    count = x.shape[0] * strips.shape[0]
    memory = np.full(count + 2 * GUARD, np.nan, np.float32)
    guards = memory[:GUARD], memory[-GUARD:]
    for number, guard in enumerate(guards):
        guard[:] = number + 0.5
    out = memory[GUARD:-GUARD].reshape(x.shape[0], strips.shape[0])
    multiplier(path, threads).multiply(strips.linear, x.numpy(), out, in_bytes)
    assert all((guard == number + 0.5).all() for number, guard in enumerate(guards)), "written beyond the output"
    return torch.from_numpy(out.copy())


def excess(
    weight: CompressedWeight, strips: NativeLayout, x: torch.Tensor, in_bytes: bool, bias: torch.Tensor | None = None
) -> dict[str, float]:
    """Return the largest error of the product of every path in units of the bound."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    found = {}
    for path in PATHS:
        allowed = bound(weight, strips, x, bias, in_bytes, path in IN_HALVES).clamp(min=1e-30)
        y = product(strips, x, path, in_bytes).double()
        assert torch.isfinite(y).all()
        found[path] = float(((y - exact).abs() / allowed).max())
    return found


def check(weight: CompressedWeight, rows: tuple[int, ...], seed: int = 0, bias: torch.Tensor | None = None) -> None:
    strips = lay_out(weight, bias)
    for count in rows:
        x = activations(count, weight.shape[1], seed)
        for in_bytes in (False, True):
            over = excess(weight, strips, x, in_bytes, bias)
            assert max(over.values()) <= 1, f"{count} rows, {'bytes' if in_bytes else 'float'}: {over} times the bound"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Draw rows whose magnitude differs from one piece of 48 columns to the next, with a piece of zeros."""
    pieces = torch.randn(rows, -(-columns // 48), generator=generator(seed + 1)).mul(2).exp()
    x = torch.randn(rows, columns, generator=generator(seed)) * pieces.repeat_interleave(48, 1)[:, :columns]
    x[0, columns // 2 : columns // 2 + 16] = 0.0
    return x


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Draw weights whose magnitude differs between rows and from one piece of 16 columns to the next, with a piece of zeros."""
    pieces = torch.randn(rows, -(-columns // 16), generator=generator(seed + 3)).exp()
    w = torch.randn(rows, columns, generator=generator(seed + 2)) * pieces.repeat_interleave(16, 1)[:, :columns] * 0.02
    w[rows // 2, : columns // 3] = 0.0
    return w


def press(fmt: Format | str, w: torch.Tensor) -> Packed:
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def alone(term: Any) -> CompressedWeight:
    return CompressedWeight((term,))


# ---- the laws ----


@functools.cache
def usual(name: str) -> CompressedWeight:
    """A weight of 19 rows (a whole strip and a bit; 20 where codes are for two) and 384 columns (more than a segment)."""
    fmt = parse_format(name)
    columns = 512 if isinstance(fmt.store, RunCodes) or fmt.block.cols == 256 else 384
    return alone(press(name, weights(19 if fmt.rows_per_code == 1 else 20, columns, 11)))


@pytest.mark.parametrize("name", [fmt.name for fmt in usual_formats()])
def test_every_format_multiplies_as_it_decodes(name: str) -> None:
    check(usual(name), (1, 3, 18))


BLOCKS = ["g16", "g24", "g32", "g40", "g64", "g96", "g128", "g192", "g320", "row", "tensor", "2x16", "3x24", "4x96"]
DRAWN = [
    "int2",
    "int3-zero",
    "int4",
    "int4-zero",
    "int5-zero-bf16",
    "int6",
    "int7-fp32",
    "int8",
    "int8-zero",
    "int4-e8m0",
    "int4-fp8",
    "int4-min",
    "int3-min-fp8",
    "int4-min-s6",
    "int2-zerofp16-bf16",
]
DRAWN += [
    "int4-zero-s6",
    "nf4",
    "e2m1-fp8",
    "e2m3-e8m0",
    "mxint8-e8m0",
    "ternary",
    "binary-bf16",
    "planes3",
    "trits2",
    "bipolar5",
]
DRAWN += [
    "tcq2",
    "tcq3s12",
    "e4m3",
    "log5",
    "bitmod3",
    "int3-zero-s4",
    "int4-dq",
    "int2-p2row",
    "kmeans3",
    "dint4-zero",
    "e8p",
    "vq8x4",
    "olive4",
]


@st.composite
def drawn_cases(draw: st.DrawFn) -> tuple[str, int, int, int, int]:
    """A format, and a shape that its block divides: few rows and many, primes, one group and several."""
    grid, *flags = draw(st.sampled_from(DRAWN)).split("-")
    block = draw(st.sampled_from(BLOCKS))
    high, wide = 1, 1
    if "x" in block:
        high, wide = (int(part) for part in block.split("x"))
    elif block.startswith("g"):
        wide = int(block[1:])
    columns = wide * draw(st.integers(1, max(1, 640 // wide)))
    if wide == 1:
        columns = draw(st.sampled_from([1, 2, 3, 15, 31, 67, 128, 131, 257, 509, 640]))
        span = find_grid(grid).span
        columns = -(-columns // span) * span
    rows = high * draw(st.sampled_from([1, 2, 5, 15, 16, 17, 31, 33, 67]))
    count = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33]))
    return "-".join([grid, block, *flags]), rows, columns, count, draw(st.integers(0, 99))


@given(drawn_cases())
@settings(max_examples=examples(80, 300), deadline=None, derandomize=True)
def test_every_shape_multiplies_as_it_decodes(case: tuple[str, int, int, int, int]) -> None:
    name, rows, columns, count, seed = case
    check(alone(press(name, weights(rows, columns, seed))), (count,), seed)


def permutation(size: int) -> Permutation:
    return Permutation(torch.randperm(size, generator=generator(5)).to(torch.int32))


def rotation(block: int) -> Hadamard:
    return Hadamard.random(200, block, generator(13))


def kept(name: str, w: torch.Tensor, chosen: torch.Tensor) -> Kept:
    return Kept.place(press(name, w[:, chosen].contiguous()), "columns", chosen)


def composed() -> dict[str, CompressedWeight]:
    """Weights of several terms and with maps, [37, 200]."""
    w = weights(37, 200, 21)
    packed, other = press("int4-g40-zero", w), press("int2-g8", w * 0.1)
    rest = w - packed.dequantize()
    few = sparse(rest, torch.rand(w.shape, generator=generator(6)) < 0.03)
    none = sparse(rest, torch.zeros_like(w).bool())
    thin = low_rank(rest, 5)
    first = torch.ones(200, dtype=torch.bool)
    first[torch.randperm(200, generator=generator(14))[:40]] = False
    order, scale = permutation(200), Scale(torch.rand(200, generator=generator(7)) + 0.5)
    terms = (packed, thin, few)
    return {
        "packed and low-rank": CompressedWeight((packed, thin)),
        "packed and sparse": CompressedWeight((packed, few)),
        "packed and nothing sparse": CompressedWeight((packed, none)),
        "all three": CompressedWeight(terms),
        "all three, other ways round": CompressedWeight(terms[::-1]),
        "two packed": CompressedWeight((packed, other)),
        "two packed and tables": CompressedWeight((packed, other, press("nf4-g50", w * 0.01), press("planes2-g20", w * 0.01))),
        "two low-rank": CompressedWeight((packed, thin, low_rank(rest, 3, "bf16"))),
        "two sparse": CompressedWeight((packed, few, sparse(rest, rest.abs() > 0.02))),
        "low-rank alone": alone(low_rank(w, 17, "bf16")),
        "low-rank in codes": CompressedWeight((packed, low_rank(rest, 6, "int8-row"))),
        "signs of low rank": CompressedWeight((packed, sign_low_rank(rest, 4))),
        "sparse alone": alone(few),
        "columns in two formats": CompressedWeight((kept("int2-g10", w, first), kept("int4-g5", w, ~first)), order),
        "columns beside all": CompressedWeight((packed, thin, kept("e4m3-row", rest, ~first), kept("int8-row", rest, first))),
        "columns alone": alone(kept("int3-g16-zero", w, first)),
        "stacked": CompressedWeight.stack_rows(
            [CompressedWeight((press("int4-tensor-zero", part), low_rank(part, 2))) for part in (w[:18], w[18:36])]
        ),
        "lossless": alone(dfloat11(w.bfloat16())),
        "permutation": CompressedWeight((packed,), order),
        "permutation, all three": CompressedWeight(terms, order),
        "permutation, through floats": CompressedWeight((press("e4m3-g40", w),), order),
        "two expanded": CompressedWeight((sign_low_rank(w, 3), sign_low_rank(rest, 4)), order),
        "scale before": CompressedWeight((packed,), scale),
        "scale after": CompressedWeight((packed,), None, Scale(torch.rand(37, generator=generator(8)) + 0.5)),
        "chain, all three": CompressedWeight(terms, Chain((scale, order))),
        "hadamard": CompressedWeight((packed,), rotation(200)),
        "hadamard in blocks": CompressedWeight((packed,), rotation(8)),
        "hadamard with Hartley's core": CompressedWeight((packed,), rotation(25)),
        "kronecker": CompressedWeight((packed,), Kronecker.random(200, generator(10))),
        "chain of four, all three": CompressedWeight(
            terms, Chain((scale, rotation(40), order, Kronecker.random(200, generator(11))))
        ),
        "chain, expanded": CompressedWeight((sign_low_rank(w, 5),), Chain((scale, rotation(200)))),
        "hadamard after": CompressedWeight((packed,), None, Hadamard.random(37, 37, generator(12))),
        "permutation after": CompressedWeight(terms, order, permutation(37)),
        "hadamard before and after": CompressedWeight(
            (press("e8p-row", w),), rotation(200), Hadamard.random(37, 37, generator(12))
        ),
    }


COMPOSED = composed()


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("with_bias", [False, True])
def test_sums_of_terms_and_maps_multiply_as_they_decode(name: str, with_bias: bool) -> None:
    weight = COMPOSED[name]
    bias = torch.randn(weight.shape[0], generator=generator(9)) if with_bias else None
    check(weight, (1, 4, 5, 33), bias=bias)


@pytest.mark.parametrize("name", ["chain, expanded", "lossless", "two sparse", "two low-rank", "two expanded"])
def test_what_is_expanded_is_named(name: str) -> None:
    weight = COMPOSED[name]
    strips, reason = lay_out(weight), reason_to_expand(weight)
    expanded = strips.expanded
    assert len(expanded) == 1 + (name == "two expanded")
    if name == "two expanded":  # they share one matrix
        assert strips.nbytes <= 2.3 * 48 * 200
        return
    # Only one pair and one set of single weights have a place; a reason is given before anything is laid out.
    assert reason in ([None] if name.startswith("two") else expanded)


@pytest.mark.parametrize(
    "name",
    [
        "all three",
        "columns in two formats",
        "columns beside all",
        "permutation, all three",
        "two packed and tables",
        "chain, all three",
        "chain of four, all three",
        "scale after",
        "hadamard after",
        "hadamard before and after",
    ],
)
def test_what_has_a_layout_is_not_expanded(name: str) -> None:
    assert lay_out(COMPOSED[name]).expanded == []
    assert reason_to_expand(COMPOSED[name]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 4, 5, 33])
def test_uncompressed_matrices_multiply(dtype: torch.dtype, path: str, count: int) -> None:
    w, bias = weights(37, 301, 31).to(dtype), torch.randn(37, generator=generator(32))
    strips, x = lay_out_matrix(w, bias), activations(count, 301, 33)
    exact = x.double() @ w.double().T + bias.double()
    size = x.abs().double() @ w.abs().double().T + bias.abs()
    rounded = fp16_step(w.double(), w.double().abs().amax(1, keepdim=True)) if dtype == torch.float32 else 0 * w.double()
    near_x, near_w = half_steps_beside(x.double()), half_steps(w.double(), 301, SEGMENT)
    if path in IN_HALVES:
        near_x, near_w = to_halves(x.double()), to_halves(w.double())
    for in_bytes in (False, True):
        dx, dw = torch.zeros_like(near_x), rounded
        if in_bytes and count > FEW_ROWS:
            dx, dw = near_x, rounded + near_w * (1 + 2.0**-11)
        allowed = dx @ (w.double().abs() + dw).T + x.double().abs() @ dw.T + 1.02 * (301 + 16) * EPS * size
        assert ((product(strips, x, path, in_bytes).double() - exact).abs() <= allowed).all()


DIFFERENCES = ["int4-g40-min", "int4-g4-min", "int3-g40-zerofp16"]


@pytest.mark.parametrize(
    "name", ["int4-g40-zero", "int8-g40", "int4-g200", "nf4-g40", "planes2-g40", "e2m3-g40-e8m0", *DIFFERENCES]
)
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("count", [4, 5])
def test_the_bound_is_no_wider_than_one_code(name: str, in_bytes: bool, count: int) -> None:
    """The same law does not hold for weights whose codes are all one higher, nor for a scale that is twice what it was."""
    term = press(name, weights(19, 200, 41))
    weight, strips = alone(term), lay_out(alone(term))
    x = torch.rand(count, 200, generator=generator(42)) + 0.1  # of one sign: differences add up
    codes, params = term.unpack()
    top = min(int(codes.max()) + 1, term.format.grid.num_codes - 1)
    higher = Packed.pack(term.format, (codes + 1).clamp(max=top).to(codes.dtype), params)
    larger = {k: v.clone() for k, v in params.items()}
    larger["scale"][3] *= 2.0
    wider = Packed.pack(term.format, codes, larger)
    assert max(excess(weight, strips, x, in_bytes).values()) <= 1
    for wrong in (higher, wider):
        assert min(excess(alone(wrong), strips, x, in_bytes).values()) > 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("count", [1, 3, 6, 40])
def test_the_bits_are_the_same_every_time_and_for_any_number_of_threads(path: str, in_bytes: bool, count: int) -> None:
    weight = COMPOSED["permutation, all three"]
    strips, x = lay_out(weight), activations(count, 200, 51)
    first = product(strips, x, path, in_bytes)
    repeats = 100 if path == PATHS[0] else 2 if path == "emulated" else 10
    for _ in range(repeats):
        assert torch.equal(product(strips, x, path, in_bytes), first)
    for threads in (2, 3):
        for _ in range(10):
            assert torch.equal(product(strips, x, path, in_bytes, threads), first)


@pytest.mark.parametrize("path", PATHS)
def test_rows_do_not_know_of_each_other(path: str) -> None:
    """A row of a product is the same whatever stands beside it, as long as there are few rows or many."""
    strips, x = lay_out(COMPOSED["all three"]), activations(40, 200, 61)
    for in_bytes in (False, True):
        many = product(strips, x, path, in_bytes)
        assert torch.equal(product(strips, x[7:23].contiguous(), path, in_bytes), many[7:23])
        few = product(strips, x[:4].contiguous(), path, in_bytes)
        for row in range(4):
            assert torch.equal(product(strips, x[row : row + 1].contiguous(), path, in_bytes)[0], few[row])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("count", [2, 6])
def test_a_power_of_two_is_only_a_power_of_two(path: str, in_bytes: bool, count: int) -> None:
    """Steps follow the magnitude of x exactly, and zeros give the bias and nothing else."""
    strips, x = lay_out(COMPOSED["all three"]), activations(count, 200, 62)
    y = product(strips, x, path, in_bytes)
    for power in (-40, 40):
        assert torch.equal(product(strips, x * 2.0**power, path, in_bytes), y * 2.0**power)
    bias = torch.randn(37, generator=generator(63))
    zeros = product(lay_out(COMPOSED["all three"], bias), torch.zeros(count, 200), path, in_bytes)
    assert torch.equal(zeros, bias.expand(count, -1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_sick_row_leaves_the_others_alone(path: str, in_bytes: bool, count: int, value: float) -> None:
    strips, x = lay_out(COMPOSED["all three"]), activations(count, 200, 64)
    well = product(strips, x, path, in_bytes)
    x[1, 77] = value
    sick = product(strips, x, path, in_bytes)
    rest = [row for row in range(count) if row != 1]
    assert torch.equal(sick[rest], well[rest])


def test_one_multiplier_serves_one_layer_after_another() -> None:
    """What was prepared for one layer is not taken for another that lives where it did, or that is cut alike."""
    for seed in range(20):
        name = "int4-g40" if seed % 2 else "int4-g40-zero"
        check(alone(press(name, weights(17, 200, seed))), (3 + 3 * (seed // 2 % 2),), seed)


@pytest.mark.parametrize("name", [fmt.name for fmt in usual_formats()])
def test_rows_of_strips_are_those_that_decode(name: str) -> None:
    weight = usual(name)
    strips, w = lay_out(weight), usual(name).dequantize()
    got = torch.stack([strips.row(row) for row in range(w.shape[0])])
    grid = parse_format(name).grid
    if strips.expanded:
        assert ((got - w).abs() <= 1.001 * fp16_step(w, w.abs().amax(1, keepdim=True))).all()
    elif isinstance(grid, Planes):  # added up with one rounding each
        assert ((got - w).abs() <= 4 * EPS * sum(codes.w.abs() for codes in codes_of(weight.terms[0]))).all()
    else:
        assert torch.equal(got, w)


@pytest.mark.parametrize("name", COMPOSED)
def test_rows_of_sums_are_those_that_decode(name: str) -> None:
    weight = COMPOSED[name]
    strips, w = lay_out(weight), weight.dequantize()
    # A row is the product with the identity.
    allowed = bound(weight, strips, torch.eye(weight.shape[1]), torch.zeros(weight.shape[0]), False).T
    got = torch.stack([strips.row(row) for row in range(w.shape[0])])
    assert ((got - w).abs() <= allowed).all()


def test_bytes_of_strips_are_about_those_of_the_format() -> None:
    for name, most in (("int4-g64", 1.0), ("int3-g64", 1.0), ("int4-g128-zero", 1.02), ("ternary-g64", 1.0), ("int4-g24", 1.0)):
        weight = alone(press(name, weights(64, 1536, 71)))
        assert lay_out(weight).nbytes <= most * weight.nbytes, name
