"""The native layout takes no more than a tenth beyond the file, and holds the values of the file to the bit.

The law covers every usual format, every scale store, small groups, and blocks along the outputs. EXCEPTIONS has what is above, and why.
"""

import pytest
import torch

from bitpress import native
from bitpress.formats import CompressedWeight
from bitpress.formats.grids.minimum_integer import MinimumInteger
from bitpress.formats.grids.planes import Planes
from bitpress.formats.listing import usual_formats
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scales import SCALES
from bitpress.formats.table import parse_format
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.kernels.native_layout import lay_out, reason_to_expand

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

SHAPE = (576, 1536)
MOST = 1.1
HALF_BITS = "all rows of a path take the bits of its wider rows"
# What is above `MOST`: the least and the most that it may be, and the reason.
EXPANDED: dict[str, tuple[float, float, str]] = {
    "pvq8k5-g8": (6.0, 6.6, "its list of points is longer than its codes: expanded to 16 bits"),
    "olive4a-row": (3.9, 4.1, "every block chooses between two lists of pairs: expanded to 16 bits"),
    "olive8-row": (1.9, 2.1, "its list of pairs is longer than its codes: expanded to 16 bits"),
}
EXCEPTIONS: dict[str, tuple[float, float, str]] = EXPANDED | {
    "trits2-g128-base3": (1.2, 1.3, "4 bits a code instead of five digits a byte"),
    "tcq1.5-row": (1.3, 1.4, HALF_BITS),
    "tcq2.5-row": (1.15, 1.25, HALF_BITS),
    "tcq3.5-row": (1.1, 1.2, HALF_BITS),
    "tcq4.5-row": (1.1, 1.2, HALF_BITS),
    "pvq4k4-g4": (1.1, 1.2, "scales of 6 bits are held in 8"),
    "ternary-g64-base3": (1.2, 1.25, "five codes a byte are held in 2 bits each, which products read directly"),
    "ternarymed-g64-base3": (1.2, 1.25, "as ternary"),
    "ternary-row-base3": (1.2, 1.27, "as ternary"),
    "ternary-g256-base3": (1.2, 1.25, "as ternary"),
    "planes2-g32-dq": (1.5, 1.65, "scales of several planes share factors: read as fp32"),
}
GRIDS = ("int2", "int3", "int4", "nf4", "ternary", "planes2", "e2m3")
NAMES = sorted(
    {
        *(fmt.name for fmt in usual_formats()),
        *(parse_format(f"{grid}-g32-{scale}").name for grid in GRIDS for scale in SCALES),
        *(f"int{bits}-g16" for bits in range(2, 9)),
        *(f"int{bits}-g16-zero-s4" for bits in (2, 3, 4)),
        *("int2-g4", "int4-g2", "int4-g4", "int2-g8", "int1-g24-zero", "int3-g24", "int2-g16-zero", "int3-g64-zero-s6"),
        *("int2-64x1-zero", "int3-64x1-zero", "int4-64x1", "int4-64x1-zero", "int4-576x1", "int4-16x2", "int4-16x16"),
        *("int4-32x32", "int4-3x16", "ternary-row-base3", "int4-tensor", "e2m1-g16-fp8", "planes4-g128", "bipolar8-g64-nested"),
    }
)
# The inputs of a weight of one of these formats: whole runs of scales, or blocks.
WIDE = {name: 512 for name in NAMES if isinstance(parse_format(name).store, RunCodes) or parse_format(name).block.cols == 256}
# Formats of a kind: scales of runs are read as fp32, and a minimum is a bit of every weight beside its number.
EXCEPTIONS |= {
    name: (1.0, 2.7, "scales of runs are read as fp32, a minimum as a bit of every weight")
    for name in NAMES
    if isinstance(parse_format(name).store, RunCodes) or isinstance(parse_format(name).grid, MinimumInteger)
}


def compressed(name: str, w: torch.Tensor) -> CompressedWeight:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))


def drawn(rows: int = SHAPE[0]) -> torch.Tensor:
    return torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(0)) * 0.02


def test_every_exception_is_a_format_of_the_law() -> None:
    assert EXCEPTIONS.keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_in_memory_are_at_most_a_tenth_above_those_of_the_file(name: str) -> None:
    fmt = parse_format(name)
    # Parameters of a few values: what is compared is sizes, and a fit of some grids takes long.
    weight = CompressedWeight((Packed(fmt, SHAPE, {n: torch.zeros(d, dtype=t) for n, (t, d) in fmt.expected(SHAPE).items()}),))
    ratio = lay_out(weight).nbytes / weight.nbytes
    low, high, _ = EXCEPTIONS.get(name, (0.0, MOST, ""))
    assert low < ratio <= high
    assert (reason_to_expand(weight) is not None) == (name in EXPANDED)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXPANDED])
def test_rows_are_those_that_the_format_decodes_to_the_bit(name: str) -> None:
    height = 576 if "576x1" in name else 192
    weight = compressed(name, drawn(height)[:, : 48 if height == 576 else WIDE.get(name, 384)].contiguous())
    strips, decoded = lay_out(weight), weight.dequantize()
    assert strips.expanded == []
    for row in (0, 17, height - 1):
        if isinstance(parse_format(name).grid, Planes):  # added up in another order
            assert torch.allclose(strips.row(row), decoded[row], rtol=2**-22, atol=1e-9)
        else:
            assert torch.equal(strips.row(row), decoded[row])


def test_a_block_of_zeros_keeps_scales_small() -> None:
    """A scale of e8m0 has no zero: such a block has the smallest power of two, which is no normal float."""
    w = drawn(32)
    w[3, :64] = 0.0
    for name in ("mxfp4", "int4-g32-e8m0", "bfp4-g32"):
        weight = compressed(name, w)
        assert lay_out(weight).nbytes <= MOST * weight.nbytes
        assert torch.equal(lay_out(weight).row(3), weight.dequantize()[3])


def test_blocks_that_are_larger_than_weights_are_expanded() -> None:
    weight = compressed("int4-g1", drawn(32))
    assert weight.bits_per_weight > 16
    assert lay_out(weight).nbytes * 8 <= 16.1 * 32 * SHAPE[1]


def test_single_weights_take_four_bytes_each() -> None:
    w = drawn()
    few = sparse(w, w.abs() > 0.05)
    assert few.count > 5000
    alone = CompressedWeight((few,))
    assert lay_out(alone).nbytes <= MOST * alone.nbytes
