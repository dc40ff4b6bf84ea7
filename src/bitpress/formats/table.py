"""The table of number formats: names to grids, and the one place where a format's name is read.

int4-g64-zero-bf16    grid, block, then in any order: `zero` for a stored zero point; fp16 (default), bf16 or fp32 scales
block                 row | tensor | gN (N columns of a row) | RxC (R rows by C columns)
"""

from bitpress.errors import FormatError, unknown_name
from bitpress.formats.block import Block
from bitpress.formats.format import SCALE_DTYPES, Format
from bitpress.formats.grid import Grid
from bitpress.formats.integer import Integer

__all__ = ["GRIDS", "describe_formats", "parse_format"]

# name -> grids with the flags they allow: False and True stand for "without" and "with a stored zero point"
GRIDS: dict[str, dict[bool, Grid]] = {
    f"int{bits}": {False: Integer(bits), True: Integer(bits, zero=True)} for bits in range(2, 9)
}


def parse_format(name: str) -> Format:
    """Read a format's name. Raises UsageError or FormatError that say which part is wrong."""
    head, *rest = name.split("-")
    if head not in GRIDS:
        raise unknown_name("number grid", head, GRIDS)
    if not rest:
        raise FormatError(f"{name!r} names no block; use for example {head}-g64, {head}-row or {head}-tensor.")
    block = Block.parse(rest[0])
    if block is None:
        raise FormatError(f"{name!r}: {rest[0]!r} is no block; blocks are row, tensor, gN and RxC, for example g64, 16x64.")
    flags = rest[1:]
    scales = [flag for flag in flags if flag in SCALE_DTYPES]
    known = set(SCALE_DTYPES) | {"zero"}
    for flag in flags:
        if flag not in known:
            raise unknown_name(f"part of format {name!r}", flag, known)
    if len(flags) != len(set(flags)) or len(scales) > 1:
        raise FormatError(f"{name!r} says a thing twice; the order is grid-block[-zero][-fp16|-bf16|-fp32].")
    zero = "zero" in flags
    return Format(GRIDS[head][zero], block, scales[0] if scales else "fp16")


def describe_formats() -> list[dict[str, object]]:
    """List every grid with what it costs in blocks of 64 and of a row of 4,096, for people and for machines."""
    rows: list[dict[str, object]] = []
    for name, variants in GRIDS.items():
        for zero, grid in variants.items():
            costs = {}
            for block in ("g64", "row"):
                fmt = Format(grid, Block(1, 64 if block == "g64" else "all"))
                costs[block] = fmt.nbytes((4096, 4096)) * 8 / 4096**2
            suffix = "-zero" if zero else ""
            rows.append(
                {
                    "name": f"{name}-g64{suffix}",
                    "bits": grid.code_bits / grid.span,
                    "levels": 1 << grid.code_bits,
                    "zero_point": zero,
                    "bits_per_weight_g64": costs["g64"],
                    "bits_per_weight_row": costs["row"],
                    "needs": f"in_features a multiple of N for gN, any shape for row and tensor; span {grid.span}",
                }
            )
    return rows
