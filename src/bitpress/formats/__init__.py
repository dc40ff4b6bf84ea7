"""Number formats: grids, blocks, bit layouts, packed terms and the weights made of them. No I/O, no model."""

from bitpress.formats.block import Block
from bitpress.formats.format import Expected, Format
from bitpress.formats.grid import EvenlySpaced, Grid, Params, StoredParam
from bitpress.formats.integer import Integer
from bitpress.formats.layouts import LAYOUTS, Layout
from bitpress.formats.levels import Levels
from bitpress.formats.maps import MAPS, Chain, Map, Permutation, Scale, chain
from bitpress.formats.packed import Packed
from bitpress.formats.scales import SCALES, ScaleStore
from bitpress.formats.table import GRIDS, PATTERNS, SHORT, Row, describe_formats, find_row, parse_format
from bitpress.formats.weight import TERMS, CompressedWeight, Term

__all__ = [
    "GRIDS",
    "LAYOUTS",
    "MAPS",
    "PATTERNS",
    "SCALES",
    "SHORT",
    "TERMS",
    "Block",
    "Chain",
    "CompressedWeight",
    "EvenlySpaced",
    "Expected",
    "Format",
    "Grid",
    "Integer",
    "Layout",
    "Levels",
    "Map",
    "Packed",
    "Params",
    "Permutation",
    "Row",
    "Scale",
    "ScaleStore",
    "StoredParam",
    "Term",
    "chain",
    "describe_formats",
    "find_row",
    "parse_format",
]
