"""Number formats: grids, blocks, bit layouts, packed terms, and weights as sums of terms. No I/O, no model."""

from bitpress.formats.activation import ActivationFormat
from bitpress.formats.attention import OPERANDS, AttentionOperands
from bitpress.formats.block import Block
from bitpress.formats.channels import ChannelFormat, InputFormat
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.formats.format import Expected, Format
from bitpress.formats.grids.grid import EvenlySpaced, Grid, Params, SharedParams, StoredParam, Streamed, Tabled
from bitpress.formats.grids.integer import Integer
from bitpress.formats.grids.levels import Levels
from bitpress.formats.layer import CompressedLayer
from bitpress.formats.layouts.table import LAYOUTS, Layout
from bitpress.formats.lossless import LOSSLESS, AnyFormat, Lossless, find_format, read_format
from bitpress.formats.maps.affine import Affine
from bitpress.formats.maps.map import MAPS, Chain, Map, Permutation, Scale, chain
from bitpress.formats.maps.rotations import Hadamard, Kronecker
from bitpress.formats.nested import narrow
from bitpress.formats.probability_offset import OffsetOf, ProbabilityOffset
from bitpress.formats.scale_store import ScaleStore
from bitpress.formats.scales import SCALES
from bitpress.formats.table import GRIDS, PATTERNS, SHORT, Row, describe_formats, find_row, parse_format
from bitpress.formats.terms.dfloat11 import DFloat11
from bitpress.formats.terms.kept import Kept
from bitpress.formats.terms.low_rank import LowRank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import Sparse
from bitpress.formats.weight import TERMS, CompressedWeight, Term

__all__ = [
    "GRIDS",
    "LAYOUTS",
    "LOSSLESS",
    "MAPS",
    "OPERANDS",
    "PATTERNS",
    "SCALES",
    "SHORT",
    "TERMS",
    "ActivationFormat",
    "Affine",
    "AnyFormat",
    "AttentionOperands",
    "Block",
    "Chain",
    "ChannelFormat",
    "CompressedLayer",
    "CompressedWeight",
    "DFloat11",
    "EvenlySpaced",
    "Expected",
    "Format",
    "Grid",
    "Hadamard",
    "InputFormat",
    "Integer",
    "Kept",
    "Kronecker",
    "Layout",
    "Levels",
    "Lossless",
    "LowRank",
    "Map",
    "OffsetOf",
    "Packed",
    "Params",
    "Permutation",
    "ProbabilityOffset",
    "Row",
    "Scale",
    "ScaleStore",
    "SharedParams",
    "Sparse",
    "StoredParam",
    "Streamed",
    "Tabled",
    "Term",
    "chain",
    "describe_formats",
    "fake_quantize",
    "find_format",
    "find_row",
    "narrow",
    "parse_format",
    "read_format",
]
