"""Number formats: grids, blocks, bit layouts, packed terms and the weights made of them. No I/O, no model."""

from bitpress.formats.block import Block
from bitpress.formats.format import Expected, Format
from bitpress.formats.grid import EvenlySpaced, Grid, Params, StoredParam
from bitpress.formats.integer import Integer
from bitpress.formats.maps import MAPS, Chain, Map, Permutation, Scale, chain
from bitpress.formats.packed import Packed
from bitpress.formats.table import GRIDS, describe_formats, parse_format
from bitpress.formats.weight import TERMS, CompressedWeight, Term

__all__ = [
    "GRIDS",
    "MAPS",
    "TERMS",
    "Block",
    "Chain",
    "CompressedWeight",
    "EvenlySpaced",
    "Expected",
    "Format",
    "Grid",
    "Integer",
    "Map",
    "Packed",
    "Params",
    "Permutation",
    "Scale",
    "StoredParam",
    "Term",
    "chain",
    "describe_formats",
    "parse_format",
]
