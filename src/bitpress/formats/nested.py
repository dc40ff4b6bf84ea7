"""Narrow a weight of 8 bits to 4 or 2 by reading fewer of its bits.

Source   "Nearly Lossless Adaptive Bit Switching" (Double Rounding): lower widths are rounded from the stored integers of the highest.
         Bipolar integers as in Ma et al. 2024, "Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores".
Differs  with bipolar integers the second rounding needs no arithmetic: the upper bits of the code are the nearest level of the narrow grid.
Needs    a weight of `bipolar8` in the layout `nested`.

    code c of 8 bits stands for 2 c - 255. With c = 16 h + l, the 4-bit code h stands for 16 (2 h - 15) in the same units, and
    2 c - 255 - 16 (2 h - 15) = 2 l - 15, which is less than 16, half the way to the next level. For 2 bits likewise, with
    64 (2 h - 3), 2 l - 63 and 64.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.format import Format
from bitpress.formats.layouts.dense import pack, row_bytes, unpack
from bitpress.formats.layouts.table import LAYOUTS
from bitpress.formats.table import find_grid, stored_format
from bitpress.formats.terms.packed import Packed
from bitpress.formats.weight import CompressedWeight

__all__ = ["NESTED_WIDTHS", "is_nested", "left_out_bytes", "narrow", "weight_at_width"]

# Bits that a nested weight can be read at: all of them first.
NESTED_WIDTHS = (8, 4, 2)


def is_nested(spec: Mapping[str, Any]) -> bool:
    """Return whether a weight of this specification has a term that can be read at several widths."""
    return any(_is_nested(stored_format(term["format"])) for term in spec["terms"] if term["kind"] == "packed")


def weight_at_width(weight: CompressedWeight, width: int) -> CompressedWeight:
    """Return a weight with its nested terms read at `width` bits; other terms stay as they are. Raises FormatError, NumericsError."""
    terms = tuple(
        narrow(term, width) if width < 8 and isinstance(term, Packed) and _is_nested(term.format) else term
        for term in weight.terms
    )
    return replace(weight, terms=terms)


def left_out_bytes(spec: Mapping[str, Any], width: int) -> int:
    """Return the bytes of codes that a weight of this specification is read without at `width` bits."""
    rows, columns = map(int, spec["shape"])
    nested = [term for term in spec["terms"] if term["kind"] == "packed" and _is_nested(stored_format(term["format"]))]
    return len(nested) * rows * (LAYOUTS["nested"].row_bytes(columns, 8) - row_bytes(columns, width))


def narrow(packed: Packed, bits: int) -> Packed:
    """Return the nearest weight of 4 or 2 bits, with scales 16 or 64 times as large.

    Raises FormatError for other grids, layouts and bits, and NumericsError if such a scale cannot be stored.
    """
    fmt = packed.format
    if not _is_nested(fmt):
        raise FormatError(f"{fmt.name} cannot be narrowed; store the weight as bipolar8-{fmt.block.name}-nested.")
    if bits not in (4, 2):
        raise FormatError(f"a weight of 8 bits can be narrowed to 4 or 2 bits, not to {bits}.")
    count = packed.shape[1]
    plane = row_bytes(count, 2)
    codes = packed.tensors["codes"][:, :plane].contiguous()
    if bits == 4:
        codes = pack(unpack(codes, 2, count) << 2 | unpack(packed.tensors["codes"][:, plane : 2 * plane], 2, count), 4)
    tensors = {"codes": codes, **_scales_times(packed, 1 << (8 - bits))}
    return Packed(Format(find_grid(f"bipolar{bits}"), fmt.block, fmt.scale), packed.shape, tensors, packed.parts)


def _is_nested(fmt: Format) -> bool:
    return fmt.grid.name == "bipolar8" and fmt.layout == "nested"


def _scales_times(packed: Packed, factor: int) -> dict[str, torch.Tensor]:
    """Return the stored scales times a power of two, exactly."""
    store = packed.format.store
    scales = {name: t for name, t in packed.tensors.items() if name != "codes"}
    floats = [name for name, t in scales.items() if t.is_floating_point()]
    if not floats:
        # Scales that are exponents only.
        stored = {"": scales["scale"]}
        return {"scale": store.pack(store.unpack(stored, scales["scale"].shape[1]) * factor, {})[""]}
    # Scales stored as codes share floats, and these carry the factor; without codes, the floats are the scales.
    # A factor that divides the scales carries the inverse.
    for name in floats:
        scales[name] = scales[name] / factor if packed.format.scale == "fp8over" else scales[name] * factor
        if not bool(torch.isfinite(scales[name]).all()):
            raise NumericsError(f"a scale times {factor} is beyond the range of {scales[name].dtype}; store scales as fp32.")
    return scales
