"""The table of number formats: names to grids, and the parser of format names.

int4-g64-zero-bf16    grid, block, then in any order: `zero`, `zerofp16`, `zerofp32` (zero points that are codes, or floats) or `min`, how scales are kept
                      (`formats.scales`), a layout (`formats.layouts.table`)
block                 row | tensor | gN (N columns of a row) | RxC (R rows by C columns)
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bitpress.errors import FormatError, UsageError, shown, unknown_name
from bitpress.foreign import foreign_hint
from bitpress.formats.block import Block
from bitpress.formats.double_quantized import dynamic_map
from bitpress.formats.format import Format
from bitpress.formats.grids.additive_book import AdditiveBook
from bitpress.formats.grids.bitmod import bitmod
from bitpress.formats.grids.block_float import signed_magnitudes, twos_complement
from bitpress.formats.grids.codebook import FixedBook, LearnedBook
from bitpress.formats.grids.denormal_integer import DenormalInteger
from bitpress.formats.grids.float_zero import FloatZero
from bitpress.formats.grids.gaussian import gaussian_levels, gaussian_points
from bitpress.formats.grids.gaussian_mixture import GaussianMixture
from bitpress.formats.grids.grid import Grid
from bitpress.formats.grids.integer import Integer
from bitpress.formats.grids.kmeans import KMeans
from bitpress.formats.grids.lattice import E8P, E81B
from bitpress.formats.grids.levels import Levels, Rule
from bitpress.formats.grids.logarithmic import logarithmic
from bitpress.formats.grids.minifloat import Specials, minifloat_levels
from bitpress.formats.grids.minimum_integer import MinimumInteger
from bitpress.formats.grids.named_levels import IQ4NL, balanced, bipolar, fp4_bitsandbytes, normal_float
from bitpress.formats.grids.outlier_pair import FLINT4, INT4, INT8, OutlierPair
from bitpress.formats.grids.planes import Planes
from bitpress.formats.grids.power import EXPONENTS, WIDE, power
from bitpress.formats.grids.pyramid import Pyramid
from bitpress.formats.grids.searched_float import searched_float
from bitpress.formats.grids.shifted_levels import shifted_levels
from bitpress.formats.grids.trellis import WIDTHS, trellis
from bitpress.formats.layouts.table import LAYOUTS
from bitpress.formats.scales import SCALES

__all__ = [
    "GRIDS",
    "PATTERNS",
    "SHORT",
    "UNNAMED_STORES",
    "VARIANTS",
    "Row",
    "describe_formats",
    "find_grid",
    "find_row",
    "is_grid",
    "parse_format",
    "spell_format",
    "stored_format",
]


@dataclass(frozen=True)
class Row:
    """A grid of the table and its description.

    zeros     the same grid with a stored zero point, by the part of a name that says how it is stored
    nearest   whether `encode` always finds the nearest of all codes; False for an approximate search
    block     its usual block, if `formats.listing` cannot derive that from the grid
    minimum   the same grid with a stored minimum, if it has one
    """

    grid: Grid
    about: str
    zeros: Mapping[str, Grid] = field(default_factory=dict)
    nearest: bool = True
    block: str = ""
    minimum: Grid | None = None

    @property
    def variants(self) -> dict[str, Grid]:
        """Return the grids of the row by what a format's name says of them: "", or a name of VARIANTS."""
        return {"": self.grid, **self.zeros} | ({} if self.minimum is None else {"min": self.minimum})

    def in_block(self, block: str) -> str:
        """Return the name of the grid in a block, with the store where a name must say it: `int4-g64`, `mxfp4-g32-e8m0`."""
        return f"{self.grid.name}-{block}" + ("" if self.grid.usual_scale else "-e8m0")


def _minifloat(
    x: int, y: int, bias: int | None = None, specials: Specials | None = None, name: str = "", rule: Rule = "absmax"
) -> Levels:
    """Return a minifloat grid; `specials` defaults to OCP's for this type."""
    ocp: dict[tuple[int, int], Specials] = {(4, 3): "fn", (5, 2): "ieee"}
    levels = minifloat_levels(x, y, bias, specials or ocp.get((x, y), "finite"))
    # A grid with levels far above 1 has scales far below the weights, where fp16 has few digits left.
    top = max(level for level in levels if not math.isnan(level))
    return Levels(name or f"e{x}m{y}", levels, rule, "" if rule == "ocp" else "fp16" if top <= 1024 else "fp32")


def _zeros(bits: int) -> dict[str, Grid]:
    """Return integers with a zero point, by how it is stored."""
    return {"zero": Integer(bits, zero=True), "zerofp16": FloatZero(bits), "zerofp32": FloatZero(bits, zero_bits=32)}


GRIDS: dict[str, Row] = {
    "int1": Row(Integer(1, zero=True), "0 and 1 less a zero point", _zeros(1)),
    **{
        f"int{b}": Row(
            Integer(b),
            f"{b}-bit integers",
            _zeros(b),
            minimum=MinimumInteger(b),
        )
        for b in range(2, 9)
    },
    **{f"bipolar{b}": Row(Levels(f"bipolar{b}", bipolar(b)), "odd integers, symmetric, no zero") for b in range(1, 9)},
    "balanced2": Row(Levels("balanced2", balanced(2)), "-2 to 2: 2 bits and a level more, symmetric"),
    **{
        f"e{x}m{bits - 1 - x}": Row(_minifloat(x, bits - 1 - x), f"{bits}-bit minifloat")
        for bits in range(3, 9)
        for x in range(1, bits)
    },
    "mxfp8": Row(_minifloat(4, 3, name="mxfp8", rule="ocp"), "OCP MXFP8, e4m3 elements"),
    "mxfp8e5m2": Row(_minifloat(5, 2, name="mxfp8e5m2", rule="ocp"), "OCP MXFP8, e5m2 elements"),
    "mxfp6": Row(_minifloat(2, 3, name="mxfp6", rule="ocp"), "OCP MXFP6, e2m3 elements"),
    "mxfp6e3m2": Row(_minifloat(3, 2, name="mxfp6e3m2", rule="ocp"), "OCP MXFP6, e3m2 elements"),
    "mxfp4": Row(_minifloat(2, 1, name="mxfp4", rule="ocp"), "OCP MXFP4, e2m1 elements"),
    "mxint8": Row(
        Levels("mxint8", twos_complement(8), "ocp", ""), "OCP MXINT8, two's complement with six places after the point"
    ),
    **{
        f"bfp{b}": Row(Levels(f"bfp{b}", signed_magnitudes(b), "ocp", "e8m0"), f"block float, {b - 1} bits and sign")
        for b in range(3, 9)
    },
    **{f"fp{b}s": Row(searched_float(b), f"{b}-bit minifloat, its exponent bits chosen per block") for b in (4, 6, 8)},
    "fp4bnb": Row(Levels("fp4bnb", fp4_bitsandbytes()), "the 4-bit float of bitsandbytes, by its codes"),
    **{f"log{b}": Row(Levels(f"log{b}", logarithmic(b)), "powers of 2 and zero, signed") for b in range(3, 7)},
    **{f"sqrtlog{b}": Row(Levels(f"sqrtlog{b}", logarithmic(b, 2)), "powers of sqrt 2 and zero, signed") for b in range(3, 8)},
    **{f"pow{b}": Row(power(b, f"pow{b}", EXPONENTS), "integers to a power that every block chooses") for b in range(2, 9)},
    **{
        f"nupes{b}": Row(power(b, f"nupes{b}", WIDE), "integers to a power that every block chooses, up to 4.75")
        for b in (4, 8)
    },
    **{
        f"dint{b}": Row(DenormalInteger(b), f"{b}-bit integers and two halves", {"zero": DenormalInteger(b, zero=True)})
        for b in range(3, 9)
    },
    "flint4": Row(
        Levels("flint4", (*FLINT4.normal, *(-level for level in FLINT4.normal))), "ANT's 4 bits: 0 to 4, 6, 8, 16, signed"
    ),
    "dynamic8": Row(
        Levels("dynamic8", tuple(dynamic_map().tolist()), "largest"), "bitsandbytes' 8-bit map: decades in linear steps"
    ),
    "nf4": Row(Levels("nf4", normal_float(4)), "quantiles of a normal distribution, 4 bits"),
    "nf3": Row(Levels("nf3", normal_float(3)), "quantiles of a normal distribution, 3 bits"),
    "nf2": Row(Levels("nf2", normal_float(2)), "quantiles of a normal distribution, 2 bits"),
    "iq4nl": Row(Levels("iq4nl", IQ4NL), "llama.cpp's 4-bit levels, closer together near zero"),
    **{f"bitmod{b}": Row(bitmod(b), f"{b}-bit floats with one more value, chosen per block", block="g128") for b in (3, 4)},
    **{
        f"iq{b}k": Row(
            shifted_levels(b), f"{b}-bit levels of ik_llama.cpp, shifted or mirrored as every block chooses", block=block
        )
        for b, block in ((2, "g16"), (3, "g16"), (4, "g32"))
    },
    **{f"kmeans{b}": Row(KMeans(b), "levels by weighted k-means, for every block its own") for b in (2, 3, 4)},
    **{f"gmm{b}": Row(GaussianMixture(b), "means of a Gaussian mixture, for every block its own") for b in (2, 3, 4)},
    **{
        f"planes{b}": Row(Planes(f"planes{b}", ((-1, 1),) * b), f"{b} planes of signs, a scale each", block="g128")
        for b in (2, 3, 4)
    },
    "dual2": Row(Planes("dual2", ((0, 1), (0, -1))), "a plane of 0 and 1 added, another taken away, a scale each"),
    "trits2": Row(Planes("trits2", ((-1, 0, 1),) * 2), "2 planes of -1, 0, 1, a scale each", block="g128"),
    "binary": Row(Levels("binary", (-1.0, 1.0), "mean"), "the sign, times the mean magnitude"),
    "ternary": Row(Levels("ternary", (-1.0, 0.0, 1.0), "mean"), "-1, 0, 1 times the mean magnitude"),
    "ternarymed": Row(Levels("ternarymed", (-1.0, 0.0, 1.0), "median"), "-1, 0, 1 times the median magnitude"),
    **{
        f"gauss{b}": Row(Levels(f"gauss{b}", gaussian_levels(b), "rms"), f"levels best for normal weights, {b} bits")
        for b in range(2, 9)
    },
    **{
        f"gauss{b}x2": Row(FixedBook(f"gauss{b}x2", gaussian_points(b)), f"{1 << b} points best for normal weights in pairs")
        for b in (4, 6, 8)
    },
    "gauss8x4": Row(FixedBook("gauss8x4", gaussian_points(8, 4)), "256 points best for normal weights in fours"),
    **{
        f"vq{b}x{span}": Row(LearnedBook(b, span), f"one of {1 << b} learned vectors of {span} weights")
        for b, span in ((4, 2), (6, 2), (8, 2), (8, 4), (12, 4))
    },
    **{
        f"aq{m}x{b}x{span}": Row(AdditiveBook(m, b, span), f"sum of {m} learned vectors of {span} weights")
        for m, b, span in ((2, 8, 8), (2, 6, 4))
    },
    "e8p": Row(E8P, "QuIP#'s codebook of the E8 lattice, 8 weights in 16 bits"),
    "e81b": Row(E81B, "QuIP#'s codebook of the E8 lattice, 8 weights in 8 bits; for what e8p leaves over"),
    **{
        f"pvq{n}k{k}": Row(Pyramid(n, k), f"pyramid: {n} weights as a direction; the scale is their length", block=f"g{n}")
        for n, k in ((4, 4), (8, 5))
    },
    **{
        name: Row(
            trellis(name), f"a path through a trellis down every column, {name[3:]} bits a weight", nearest=False, block="row"
        )
        for name in WIDTHS
    },
    "olive4": Row(OutlierPair("olive4", (INT4,)), "OliVe: pairs of 4-bit integers, or an outlier and a zero"),
    "olive4f": Row(OutlierPair("olive4f", (FLINT4,)), "OliVe: pairs of flint4, or an outlier and a zero"),
    "olive4a": Row(OutlierPair("olive4a", (INT4, FLINT4)), "OliVe: pairs of integers or of flint4, chosen per block"),
    "olive8": Row(OutlierPair("olive8", (INT8,)), "OliVe: pairs of 8-bit integers, or an outlier and a zero"),
}

# Families with too many members for a row each: a pattern, its description, and a function from a match to a grid.
PATTERNS: tuple[tuple[re.Pattern[str], str, Callable[[re.Match[str]], Grid]], ...] = (
    (
        re.compile(r"e([1-7])m([0-6])(?:b(0|[1-9][0-9]?))?(i?)"),
        "eXmYbB: bias B; eXmYi: with infinities",
        lambda m: _minifloat(int(m[1]), int(m[2]), None if m[3] is None else int(m[3]), "ieee" if m[4] else None, name=m[0]),
    ),
    (
        re.compile(r"pvq([1-9][0-9]?)k([1-9][0-9]?)"),
        "pvqNkK: N weights as a direction, magnitudes that add up to K",
        lambda m: Pyramid(int(m[1]), int(m[2])),
    ),
    (
        re.compile(r"vq([1-9]|1[0-6])x([2-9]|1[0-6])"),
        "vqBxN: B bits for N weights, a vector learned from the weight",
        lambda m: LearnedBook(int(m[1]), int(m[2])),
    ),
    (
        re.compile(r"(tcq(?:(?:1|2|3|4)(?:\.5)?|5))s(1[0-6])"),
        "tcqNsB: a trellis with B bits of state, 10 to 16, where tcqN has 14",
        lambda m: trellis(m[1], int(m[2])),
    ),
    (
        re.compile(r"aq([2-9]|1[0-6])x([1-8])x([2-9]|1[0-6])"),
        "aqMxBxN: M times B bits, 16 at most, for N weights, a sum of M vectors learned from the weight",
        lambda m: AdditiveBook(int(m[1]), int(m[2]), int(m[3])),
    ),
)

# Parameters that a grid of the same name may have or not have, as a format's name says them, and what is said of a grid that has one.
VARIANTS: dict[str, str] = {
    "zero": ", with a zero point",
    "zerofp16": ", with a zero point between codes",
    "zerofp32": ", with a zero point between codes in float32",
    "min": ", with a minimum",
}

# The stores of MX grids whose name has none. Such a name says OCP's powers of two and meant these: only files may still have it.
UNNAMED_STORES: dict[str, str] = {
    **dict.fromkeys(("mxfp8", "mxfp6", "mxfp6e3m2", "mxfp4", "mxint8"), "fp16"),
    "mxfp8e5m2": "fp32",
}

# Names that the field uses for a whole format.
SHORT: dict[str, str] = {
    "mxfp8": "mxfp8-g32-e8m0",
    "mxfp8e5m2": "mxfp8e5m2-g32-e8m0",
    "mxfp6": "mxfp6-g32-e8m0",
    "mxfp6e3m2": "mxfp6e3m2-g32-e8m0",
    "mxfp4": "mxfp4-g32-e8m0",
    "mxint8": "mxint8-g32-e8m0",
    "nvfp4": "e2m1-g16-fp8",
    # llama.cpp's
    "q4_0": "int4-g32",
    "q4_1": "int4-g32-min",
    "q5_0": "int5-g32",
    "q5_1": "int5-g32-min",
    "q8_0": "int8-g32",
    "q2_k": "int2-g16-min-s4x16",
    "q3_k": "int3-g16-i6x16",
    "q4_k": "int4-g32-min-s6x8",
    "q5_k": "int5-g32-min-s6x8",
    "q6_k": "int6-g16-i8x16",
    "iq4_nl": "iq4nl-g32",
    "iq4_xs": "iq4nl-g32-i6x8",
    "tq1_0": "ternary-g256-base3",
    "tq2_0": "ternary-g256",
}


def is_grid(name: str) -> bool:
    """Return whether a grid has this name."""
    return name in GRIDS or any(pattern.fullmatch(name) for pattern, _, _ in PATTERNS)


def spell_format(name: str) -> str:
    """Return a format's name as the tables spell it if only its case, or `_` for `-`, differs: INT4_G64 is int4-g64."""
    if (lowered := name.strip().lower()) in SHORT:  # with the `_` of llama.cpp's own names
        return lowered
    spelled = lowered.replace("_", "-")
    short = next((known for known in SHORT if known.replace("_", "-") == spelled), None)
    return short or (spelled if is_grid(spelled.split("-")[0]) else name)


def find_row(name: str) -> Row:
    """Return the row of a grid's name; for a member of a family the row is made."""
    if name in GRIDS:
        return GRIDS[name]
    for pattern, _, make in PATTERNS:
        match = pattern.fullmatch(name)
        if match is not None:
            return Row(make(match), "")
    listed = "A format is grid-block[-zero|-min][-scale][-layout], for example int4-g64-zero; `bitpress formats` lists them."
    raise unknown_name("number grid", name, GRIDS, listed)


def find_grid(name: str, variant: str = "") -> Grid:
    """Return the grid of a name, or its variant by a name of VARIANTS. Raises UsageError or FormatError."""
    found = find_row(name).variants
    if variant not in found:
        others = [other for other in found if other]
        told = f"; it has {', '.join(others)}." if others else f"; leave out `{variant}`."
        raise FormatError(f"{name} has no variant{VARIANTS[variant].removeprefix(',')} ({variant})" + told)
    return found[variant]


def stored_format(name: str) -> Format:
    """Read a format's name in a file: that of an MX grid without a store means what it meant when the file was written."""
    return _parse(name, UNNAMED_STORES)


def parse_format(name: str) -> Format:
    """Read a format's name. Raises UsageError or FormatError that say which part is wrong."""
    return _parse(name, {})


def _parse(name: str, unnamed: Mapping[str, str]) -> Format:
    head, *rest = SHORT.get(name, name).split("-")
    if not is_grid(head) and (hint := foreign_hint(name)):
        raise UsageError(f"unknown number format {shown(name)}. {hint}")
    find_row(head)
    if not rest:
        raise FormatError(f"{name!r} names no block; use for example {head}-g64, {head}-row or {head}-tensor.")
    block = Block.parse(rest[0])
    if block is None:
        raise FormatError(f"{name!r}: {rest[0]!r} is no block; blocks are row, tensor, gN and RxC, for example g64, 16x64.")
    flags = rest[1:]
    known = {*VARIANTS, *SCALES, *LAYOUTS}
    for flag in flags:
        if flag not in known:
            raise unknown_name(f"part of format {name!r}", flag, known)
    scales = [flag for flag in flags if flag in SCALES]
    layouts = [flag for flag in flags if flag in LAYOUTS]
    variants = [flag for flag in flags if flag in VARIANTS]
    if len(flags) != len(set(flags)) or max(map(len, (scales, layouts, variants))) > 1:
        raise FormatError(f"{name!r} repeats a part; the order is grid-block[-zero|-min][-scale][-layout].")
    grid = find_grid(head, *variants)
    scale = scales[0] if scales else grid.usual_scale or unnamed.get(head)
    if scale is None:
        raise FormatError(f"{name!r} names no store of its scales, which are powers of two in MX: use {head}-{rest[0]}-e8m0.")
    return Format(grid, block, scale, *(layouts or ["dense"]))


def describe_formats() -> list[dict[str, object]]:
    """Return every grid with its bits in blocks of 64 and in rows of 4,096, for people and for machines."""
    rows: list[dict[str, object]] = []
    for row in GRIDS.values():
        for variant, grid in row.variants.items():
            if variant and grid == row.grid:
                continue
            costs = {}
            for block in ("g64", "row"):
                fmt = Format(grid, Block(1, 64 if block == "g64" else "all"), grid.usual_scale or "e8m0")
                costs[block] = fmt.nbytes((4096, 4096)) * 8 / 4096**2
            suffix = f"-{variant}" if variant else ""
            rows.append(
                {
                    "name": row.in_block("g64") + suffix,
                    "about": row.about + VARIANTS.get(variant, ""),
                    "bits": fmt.code_bits_per_weight,
                    "levels": grid.num_codes,
                    "span": grid.span,
                    "zero_point": variant.startswith("zero"),
                    "minimum": variant == "min",
                    "bits_per_weight_g64": costs["g64"],
                    "bits_per_weight_row": costs["row"],
                    "needs": f"in_features a multiple of N for gN, any shape for row and tensor; span {grid.span}",
                }
            )
    return rows
