"""The native layout takes no more than a tenth beyond the file, and holds the values of the file to the bit.

The law covers every usual format, every scale store, small groups, blocks along the outputs, and terms beside codes.
"""

import pytest
import torch

from bitpress import native
from bitpress.formats import CompressedWeight
from bitpress.formats.grids.planes import Planes
from bitpress.formats.listing import usual_formats
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scales import SCALES
from bitpress.formats.table import parse_format
from bitpress.formats.terms.kept import Kept
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.kernels.native_layout import lay_out, reason_to_expand

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

SHAPE = (576, 1536)
MOST = 1.1
GRIDS = ("int2", "int3", "int4", "nf4", "ternary", "planes2", "e2m3")
NAMES = sorted(
    {
        *(fmt.name for fmt in usual_formats()),
        *("int4-g64-zerofp32", "int1-g64-zerofp16", "int8-g64-zerofp16"),
        *(parse_format(f"{grid}-g32-{scale}").name for grid in GRIDS for scale in SCALES),
        *(f"int{bits}-g16" for bits in range(2, 9)),
        *(f"int{bits}-g16-zero-s4" for bits in (2, 3, 4)),
        *("int2-g4", "int4-g2", "int4-g4", "int2-g8", "int1-g24-zero", "int3-g24", "int2-g16-zero", "int3-g64-zero-s6"),
        *("int2-64x1-zero", "int3-64x1-zero", "int4-64x1", "int4-64x1-zero", "int4-576x1", "int4-16x2", "int4-16x16"),
        *("int4-32x32", "int4-3x16", "ternary-row-base3", "int4-tensor", "e2m1-g16-fp8", "planes4-g128", "bipolar8-g64-nested"),
        *("e2m3-g64-split", "tcq1.5s10-g64", "tcq2.5-g32", "ternary-g16-base3", "ternary-24x1-base3", "trits2-g48-dq-base3"),
        *(f"int4-g32-min-{scale}" for scale in SCALES),
        *("int4-g8-min", "int3-g24-min", "int4-64x1-min", "int4-16x16-min-fp8", "int4-3x16-min-s6", "int4-16x16-zerofp16"),
        *("int3-g24-zerofp16", "int4-g16-zerofp16-s4", "int4-2x32-min-s6x8", "int3-32x16-i8x16", "planes3-g64-i6x8"),
        *("olive4a-g16", "olive8-g64", "pvq8k5-g64", "int4-g16-s6", "int4-16x16-s6"),
    }
)
# The inputs of a weight of one of these formats: whole runs of scales, or blocks.
WIDE = {name: 512 for name in NAMES if isinstance(parse_format(name).store, RunCodes) or parse_format(name).block.cols == 256}


def compressed(name: str, w: torch.Tensor) -> CompressedWeight:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))


def drawn(rows: int = SHAPE[0]) -> torch.Tensor:
    return torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("name", NAMES)
def test_bytes_in_memory_are_at_most_a_tenth_above_those_of_the_file(name: str) -> None:
    fmt = parse_format(name)
    # Parameters of a few values: what is compared is sizes, and a fit of some grids takes long.
    weight = CompressedWeight((Packed(fmt, SHAPE, {n: torch.zeros(d, dtype=t) for n, (t, d) in fmt.expected(SHAPE).items()}),))
    assert lay_out(weight).nbytes <= MOST * weight.nbytes
    assert reason_to_expand(weight) is None


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_that_the_format_decodes_to_the_bit(name: str) -> None:
    height = 576 if "576x1" in name else 192
    weight = compressed(name, drawn(height)[:, : 48 if height == 576 else WIDE.get(name, 384)].contiguous())
    strips, decoded = lay_out(weight), weight.dequantize()
    assert strips.expanded == []
    for row in (0, 17, height - 1):
        # Added up in another order, or multiplied by an inverse, also of what the minimum is taken away from.
        if isinstance(parse_format(name).grid, Planes) or "fp8over" in name:
            atol = 2**-22 * float(decoded.abs().max()) if "-min" in name else 1e-9
            assert torch.allclose(strips.row(row), decoded[row], rtol=2**-22, atol=atol)
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


MINIMA = ("int2-g32-min-s4x16", "int4-g16-zerofp16")


def columns(name: str, w: torch.Tensor, chosen: torch.Tensor) -> Kept:
    return Kept.place(compressed(name, w[:, chosen].contiguous()).terms[0], "columns", chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("many", "few"), [("binary-row", "int4-row"), ("int2-g16", "int4-g16"), ("tcq1.5-row", "int8-row"), MINIMA]
)
def test_columns_in_formats_of_their_own_take_theirs_alone(many: str, few: str) -> None:
    w = drawn()
    chosen = torch.arange(SHAPE[1]) % 48 < 16
    weight = CompressedWeight((columns(many, w, ~chosen), columns(few, w, chosen)))
    strips = lay_out(weight)
    assert strips.expanded == []
    assert strips.nbytes <= MOST * weight.nbytes
    for row in (0, 17, 575):
        assert torch.equal(strips.row(row), weight.dequantize()[row])


@pytest.mark.parametrize("name", ["int8-row", "int4-g16", "fp16"])
def test_factors_take_the_bits_of_their_format(name: str) -> None:
    w = drawn()
    codes = compressed("int4-g64", w)
    weight = CompressedWeight((*codes.terms, low_rank(w - codes.dequantize(), 64, name)))
    strips = lay_out(weight)
    assert strips.nbytes <= MOST * weight.nbytes
    torch.testing.assert_close(strips.row(17), weight.dequantize()[17], rtol=1e-5, atol=1e-7)
