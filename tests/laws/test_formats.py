"""Laws of number formats, over every row of the table."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import GRIDS, CompressedWeight, Format, Packed, dense, describe_formats, parse_format

NAMES = [
    f"{grid}-{block}{zero}{scale}"
    for grid in GRIDS
    for block, zero, scale in itertools.product(("g8", "row", "tensor", "2x8"), ("", "-zero"), ("", "-bf16", "-fp32"))
]


def weight(fmt: Format, rows: int, blocks: int, seed: int) -> torch.Tensor:
    cols = 8 * blocks if fmt.block.cols != "all" else 8 * blocks - 3
    return torch.randn(2 * rows, cols, generator=torch.Generator().manual_seed(seed))


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_unpack_gives_back_what_was_packed(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = dense.pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(dense.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_layout_is_the_documented_one(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 29), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    for row, packed in zip(codes.tolist(), dense.pack(codes, bits).tolist(), strict=True):
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(packed) == whole.to_bytes((29 * bits + 7) // 8, "little")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back_and_bytes_are_what_is_stored(name: str) -> None:
    fmt = parse_format(name)
    assert parse_format(fmt.name) == fmt
    w = weight(fmt, 2, 5, 1)
    params = fmt.fit(w)
    compressed = CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))
    assert compressed.nbytes == fmt.nbytes((w.shape[0], w.shape[1]))
    assert compressed.bits_per_weight == compressed.nbytes * 8 / w.numel()
    rebuilt = CompressedWeight.build(compressed.spec(), compressed.tensors())
    assert torch.equal(rebuilt.dequantize(), compressed.dequantize())
    assert torch.equal(compressed.dequantize(), fmt.decode(fmt.encode(w, params), params))


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_fixed_points(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 3, 2)
    params = fmt.fit(w)
    # Every code of the grid once and again, not only those that this weight would get.
    codes = torch.arange(w.numel()).reshape(w.shape).remainder(1 << fmt.grid.code_bits).to(torch.uint8)
    levels = fmt.decode(codes, params)
    assert torch.equal(fmt.decode(fmt.encode(levels, params), params), levels)


@pytest.mark.parametrize("name", NAMES)
def test_encode_picks_the_nearest_level(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 1, 2, 3)
    params = fmt.fit(w)
    chosen = (fmt.decode(fmt.encode(w, params), params) - w).abs()
    every = [(fmt.decode(torch.full(w.shape, c, dtype=torch.uint8), params) - w).abs() for c in range(1 << fmt.grid.code_bits)]
    nearest = torch.stack(every).amin(0)
    # Two levels may be equally near up to the rounding of (codes - zero) * scale in float32.
    assert torch.all(chosen <= nearest + 4 * torch.finfo(torch.float32).eps * w.abs().max())


@pytest.mark.parametrize("name", [n for n in NAMES if "tensor" not in n])
def test_min_max_clips_nothing(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 4, 4)
    params = fmt.fit(w)
    error = (fmt.decode(fmt.encode(w, params), params) - w).abs()
    scale = fmt.decode(torch.full(w.shape, 1, dtype=torch.uint8), params) - fmt.decode(
        torch.zeros_like(w, dtype=torch.uint8), params
    )
    # Half a step, or where the scale was rounded to 8 (bf16) or 11 bits (fp16) one part in 2^8 of the range more.
    assert torch.all(error <= 0.5 * scale + (1 << fmt.grid.code_bits) * scale * 2.0**-8 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_search_is_never_worse_than_min_max(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 4, 5)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(6))

    def error(shrink: tuple[float, ...]) -> float:
        params = fmt.fit(w, importance, shrink)
        return float(((fmt.decode(fmt.encode(w, params), params) - w).square() * importance).sum())

    assert error((1.0, 0.9, 0.8, 0.7)) <= error((1.0,)) * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 1, 1, 7)
    w[0, 0] = value
    with pytest.raises(NumericsError, match="NaN or an infinity"):
        fmt.fit(w)


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_stay_zeros(grid: str) -> None:
    for suffix in ("", "-zero"):
        fmt = parse_format(f"{grid}-g8{suffix}")
        w = torch.zeros(2, 16)
        params = fmt.fit(w)
        assert torch.equal(fmt.decode(fmt.encode(w, params), params), w)


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_are_cut_and_stacked_without_change(grid: str) -> None:
    for block in ("g8-zero", "2x8", "row"):
        fmt = parse_format(f"{grid}-{block}")
        w = torch.randn(6, 16, generator=torch.Generator().manual_seed(8))
        params = fmt.fit(w)
        whole = CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))
        parts = [whole.row_slice(i, i + 2) for i in (0, 2, 4)]
        assert torch.equal(CompressedWeight.stack_rows(parts).dequantize(), whole.dequantize())
        assert torch.equal(parts[1].dequantize(), whole.dequantize()[2:4])


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("int9-g64", UsageError, "int8"),
        ("nit4-g64", UsageError, "Did you mean 'int4'"),
        ("int4", FormatError, "names no block"),
        ("int4-64", FormatError, "is no block"),
        ("int4-g0", FormatError, "is no block"),
        ("int4-g64-zreo", UsageError, "Did you mean 'zero'"),
        ("int4-g64-fp16-bf16", FormatError, "twice"),
        ("int4-g64-zero-zero", FormatError, "twice"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_format(name)


def test_a_shape_that_does_not_fit_names_blocks_that_do() -> None:
    with pytest.raises(FormatError, match=r"in_features=576 is not a multiple of 128; blocks that fit: g192, g96, g64"):
        parse_format("int4-g128").fit(torch.zeros(2, 576))
    with pytest.raises(FormatError, match="out_features=3"):
        parse_format("int4-2x8").fit(torch.zeros(3, 8))


def test_a_scale_beyond_half_precision_is_refused() -> None:
    with pytest.raises(NumericsError, match="beyond the range of fp16"):
        parse_format("int2-row").fit(torch.full((1, 8), 1e6))
    assert torch.isfinite(parse_format("int2-row-bf16").fit(torch.full((1, 8), 1e6))["scale"]).all()


def test_the_list_of_formats_agrees_with_the_formats() -> None:
    for row in describe_formats():
        fmt = parse_format(str(row["name"]))
        assert row["bits_per_weight_g64"] == fmt.nbytes((4096, 4096)) * 8 / 4096**2
