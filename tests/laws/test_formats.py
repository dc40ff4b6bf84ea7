"""Laws of number formats, over every row of the table."""

import math
from typing import Any

import pytest
import torch
from covering import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import (
    GRIDS,
    LAYOUTS,
    SCALES,
    SHORT,
    CompressedWeight,
    Format,
    Levels,
    Packed,
    Params,
    Row,
    describe_formats,
    find_row,
    parse_format,
)
from bitpress.formats.grids.grid import Grid
from bitpress.formats.grids.integer import Integer
from bitpress.formats.grids.minimum_integer import MinimumInteger
from bitpress.formats.layouts import dense
from bitpress.formats.layouts.dense import code_dtype
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.table import UNNAMED_STORES

# A name of every family that has no row for each member.
FAMILIES = ["e4m3b11", "e2m1b0", "e4m3i", "e3m4i", "pvq2k6", "pvq16k2", "vq5x2", "aq3x3x2"]


# Grids that are tried with every scale store; every other grid is tried with two of them, taken in turn.
THOROUGH = {"int4", "e4m3", "mxfp4", "nf4", "binary", "planes2", "e8p", "vq8x4", "olive4", "toy3"}


def variants(name: str) -> list[str]:
    """The grid with every block, and with scale stores, zero point and layouts that it takes, one at a time."""
    row = find_row(name)
    stores = (
        [scale for scale in SCALES if scale != row.grid.usual_scale] if any(p.kind == "scale" for p in row.grid.params) else []
    )
    if name not in THOROUGH and stores:
        turn = list(GRIDS).index(name) if name in GRIDS else 0
        stores = [stores[turn % len(stores)], stores[(turn + len(stores) // 2) % len(stores)]]
    plain = row.in_block("").removeprefix(f"{name}-")
    extras = [f"-{scale}" for scale in stores] + [e for zero in row.zeros for e in (f"-{zero}", f"-{zero}-s6")]
    extras += ["-min", "-min-s6x8", "-min-fp8"] if row.minimum else []
    for layout_name, layout in LAYOUTS.items():
        if layout_name != "dense" and not layout.refuses(row.grid.code_bits, row.grid.num_codes):
            extras.append(f"{plain}-{layout_name}")
    blocks = [f"{name}-{b}{plain}" for b in ("g16", "row", "tensor", "2x16")]
    return blocks + [f"{name}-{'g16' if i % 2 else '2x16'}{e}" for i, e in enumerate(extras)]


NAMES = [name for grid in [*GRIDS, *FAMILIES] for name in variants(grid)]
PLAIN = [variants(grid)[0] for grid in [*GRIDS, *FAMILIES]]


def every_run() -> set[str]:
    """The thorough grids with all variants, and every other grid in groups of 16 and with one of its variants, taken in turn."""
    chosen = set(PLAIN)
    for turn, grid in enumerate([*GRIDS, *FAMILIES]):
        names = variants(grid)
        chosen |= set(names) if grid in THOROUGH else {names[turn % len(names)]}
    return chosen


EVERY_RUN = every_run()


def named(names: list[str]) -> list[Any]:
    """Make parameters of names; those that not every run tries are marked `release`."""
    return [pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.release) for name in names]


def weight(fmt: Format, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Rows in pairs; an odd width where the block is a whole row."""
    if isinstance(fmt.store, RunCodes):  # rows of whole runs
        blocks = -(-blocks // fmt.store.run) * fmt.store.run
    cols = 16 * blocks - (fmt.grid.span if fmt.block.cols == "all" else 0)
    cols -= cols % fmt.grid.span
    return torch.randn(2 * rows, cols, generator=torch.Generator().manual_seed(seed))


def compress(fmt: Format, w: torch.Tensor) -> tuple[CompressedWeight, Params]:
    params = fmt.fit(w)
    return CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),)), params


def legal_codes(fmt: Format) -> torch.Tensor:
    """Every code that stands for something, of a grid of at most 65,536."""
    grid = fmt.grid
    codes = torch.arange(1 << grid.code_bits).to(code_dtype(grid.code_bits))
    if grid.num_codes == len(codes):
        return codes
    legal = []
    for some in codes.split(256):
        for part in [some] if passes(grid, some) else some.split(1):
            if passes(grid, part):
                legal.append(part)
    assert sum(map(len, legal)) == grid.num_codes
    return torch.cat(legal)


def decode_everywhere(fmt: Format, codes: torch.Tensor, params: Params, shape: tuple[int, int]) -> torch.Tensor:
    """Return what every code stands for at every place of a weight, `[codes, out, in]`: rows are decoded one weight below another."""
    below = dict(params)
    if fmt.block.rows != "all":
        for p in fmt.grid.params:
            if p.scope == "block":
                below[p.name] = params[p.name].repeat(len(codes), *[1] * (params[p.name].ndim - 1))
    values = fmt.decode(codes.repeat_interleave(shape[0])[:, None].repeat(1, shape[1]), below)
    return values.reshape(len(codes), -1, values.shape[1])


def passes(grid: Grid, codes: torch.Tensor) -> bool:
    try:
        grid.check(codes)
    except FormatError:
        return False
    return True


@given(bits=st.integers(1, 24), rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=examples(300, 1500), deadline=None, derandomize=True)
def test_unpack_gives_back_what_was_packed(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(code_dtype(bits))
    packed = dense.pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(dense.unpack(packed, bits, count), codes)


@given(name=st.sampled_from(PLAIN), rows=st.integers(1, 3), codes=st.integers(1, 37), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=examples(250, 1000), deadline=None, derandomize=True)
def test_every_layout_gives_back_any_codes_of_its_grids(name: str, rows: int, codes: int, seed: int) -> None:
    grid = parse_format(name).grid
    values = torch.randint(0, grid.num_codes, (rows, codes), generator=torch.Generator().manual_seed(seed))
    values = values.to(code_dtype(grid.code_bits))
    for layout in LAYOUTS.values():
        if layout.refuses(grid.code_bits, grid.num_codes) is None:
            packed = layout.pack(values, grid.code_bits)
            assert packed.shape == (rows, layout.row_bytes(codes, grid.code_bits))
            assert packed.dtype == torch.uint8
            assert torch.equal(layout.unpack(packed, grid.code_bits, codes), values)


@pytest.mark.parametrize("bits", range(1, 25))
def test_the_dense_layout_is_the_documented_one(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 29), generator=torch.Generator().manual_seed(bits)).to(code_dtype(bits))
    for row, packed in zip(codes.tolist(), dense.pack(codes, bits).tolist(), strict=True):
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(packed) == whole.to_bytes((29 * bits + 7) // 8, "little")


@pytest.mark.parametrize("name", named(NAMES))
def test_a_name_is_read_back_and_bytes_are_what_is_stored(name: str) -> None:
    fmt = parse_format(name)
    assert parse_format(fmt.name) == fmt
    w = weight(fmt, 2, 5, 1)
    compressed, params = compress(fmt, w)
    assert compressed.nbytes == fmt.nbytes((w.shape[0], w.shape[1]))
    assert compressed.bits_per_weight == compressed.nbytes * 8 / w.numel()
    rebuilt = CompressedWeight.build(compressed.spec(), compressed.tensors())
    assert torch.equal(rebuilt.dequantize(), compressed.dequantize())
    assert torch.equal(compressed.dequantize(), fmt.decode(fmt.encode(w, params), params))


@pytest.mark.parametrize("name", named(NAMES))
def test_levels_are_fixed_points(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 3, 2)
    params = fmt.fit(w)
    # Codes from all over the grid, not only those that this weight would get.
    legal = legal_codes(fmt)
    shape = (w.shape[0] // fmt.rows_per_code, w.shape[1] // fmt.grid.span)
    codes = legal[(torch.arange(math.prod(shape)) * 7919).remainder(len(legal))].reshape(shape)
    levels = fmt.decode(codes, params)
    assert torch.isfinite(levels).all()
    again = fmt.decode(fmt.encode(levels, params), params)
    # Where codewords are added up in float32, two codes may stand for numbers that differ in the last digits alone.
    exact = fmt.grid.span == 1
    torch.testing.assert_close(again, levels, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("name", named([n for n in NAMES if find_row(n.split("-")[0]).nearest]))
def test_encode_picks_the_nearest_level(name: str) -> None:
    fmt = parse_format(name)
    legal = legal_codes(fmt)
    w = weight(fmt, 1, 2 if len(legal) <= 4096 else 1, 3)[:, : 32 if fmt.block.cols == "all" else None]
    params = fmt.fit(w)
    chosen = (fmt.decode(fmt.encode(w, params), params) - w).square()
    distance = chosen.reshape(w.shape[0], -1, fmt.grid.span).sum(-1)
    shape = (w.shape[0], w.shape[1] // fmt.grid.span)
    nearest = torch.full(shape, math.inf)
    for some in (legal if len(legal) <= 4096 else legal[:: len(legal) // 4096]).split(64):
        each = (decode_everywhere(fmt, some, params, shape) - w).square()
        nearest = torch.minimum(nearest, each.reshape(len(some), *shape, fmt.grid.span).sum(-1).amin(0))
    # Two levels may be equally near up to the rounding of the arithmetic in float32.
    slack = 4 * torch.finfo(torch.float32).eps * w.abs().max() * fmt.grid.span
    assert torch.all(distance.sqrt() <= nearest.sqrt() + slack + (1e-4 if fmt.grid.span > 1 else 0))


def clips_nothing(name: str) -> bool:
    fmt = parse_format(name)
    fitted = isinstance(fmt.grid, Integer | MinimumInteger) or (isinstance(fmt.grid, Levels) and fmt.grid.rule == "absmax")
    return fitted and fmt.scale in ("fp16", "bf16", "fp32") and fmt.block.cols == 16


@pytest.mark.parametrize("name", named([n for n in NAMES if clips_nothing(n)]))
def test_min_max_clips_nothing(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 4, 4)
    params = fmt.fit(w)
    error = (fmt.decode(fmt.encode(w, params), params) - w).abs()
    levels = decode_everywhere(fmt, legal_codes(fmt), params, (w.shape[0], w.shape[1]))
    widest = levels.sort(0).values.diff(dim=0).amax(0)
    # Half the widest step, or where the scale was rounded to 8 (bf16) or 11 bits (fp16) one part in 2^8 of the range more.
    assert torch.all(error <= 0.5 * widest + levels.abs().amax(0) * 2.0**-8 + 1e-6)


@pytest.mark.parametrize("name", named(NAMES))
def test_a_search_is_never_worse_than_min_max(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 4, 5)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(6))

    def error(shrink: tuple[float, ...]) -> float:
        params = fmt.fit(w, importance, shrink)
        return float(((fmt.decode(fmt.encode(w, params), params) - w).square() * importance).sum())

    assert error((1.0, 0.9, 0.8, 0.7)) <= error((1.0,)) * (1 + 1e-6)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 1, 1, 7)
    w[0, 0] = value
    with pytest.raises(NumericsError, match="NaN or an infinity"):
        fmt.fit(w)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("grid", ["int4", "gauss4", "bfp4", "planes2"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_largest_weights_are_stored_or_refused(grid: str, scale: str, everywhere: bool) -> None:
    fmt = parse_format(f"{grid}-g16-{scale}")
    w = weight(fmt, 2, 2, 17)
    w[:, :: 1 if everywhere else 32] = 3e38
    try:
        compressed, _ = compress(fmt, w)
    except NumericsError:
        return
    compressed.terms[0].check()
    # What is stored decodes; a weight at the end of float32 may be rounded beyond it.
    assert not compressed.dequantize().isnan().any()


@pytest.mark.parametrize("name", PLAIN)
def test_zeros_stay_zeros(name: str) -> None:
    fmt = parse_format(name)
    w = torch.zeros(2, 32)
    assert torch.equal(compress(fmt, w)[0].dequantize(), w)


@pytest.mark.parametrize("name", PLAIN)
def test_tiny_weights_do_not_become_zeros_in_silence(name: str) -> None:
    fmt = parse_format(name)
    w = torch.randn(2, 32, generator=torch.Generator().manual_seed(9)) * 1e-6
    assert compress(fmt, w)[0].dequantize().abs().max() > 0


@pytest.mark.parametrize("name", named([n for n in NAMES if "-g16" in n and not n.endswith("-dq")]))
def test_a_tiny_block_beside_large_ones_keeps_a_scale(name: str) -> None:
    """Nested scales (dq) are the exception: they are kept as differences from their mean."""
    fmt = parse_format(name)
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(16))
    w[1, 16:32] *= 1e-7
    params = fmt.fit(w)
    for p in fmt.grid.params:
        if p.kind == "scale" and p.scope == "block":
            assert params[p.name][1, 1].max() > 0


@pytest.mark.parametrize("name", named(NAMES))
def test_rows_are_cut_and_stacked_without_change(name: str) -> None:
    fmt = parse_format(name)
    experts = [weight(fmt, 1, 2, seed) for seed in (8, 9, 10)]
    singles = [compress(fmt, w)[0] for w in experts]
    whole = CompressedWeight.stack_rows(singles)
    expected = torch.cat([s.dequantize() for s in singles])
    assert torch.equal(whole.dequantize(), expected)
    rebuilt = CompressedWeight.build(whole.spec(), whole.tensors())
    assert torch.equal(rebuilt.dequantize(), expected)
    assert torch.equal(rebuilt.row_slice(2, 4).dequantize(), singles[1].dequantize())


@pytest.mark.parametrize("name", PLAIN)
def test_one_column_decodes_as_in_the_whole(name: str) -> None:
    fmt = parse_format(name)
    w = weight(fmt, 2, 3, 11)
    params = fmt.fit(w)
    shape, span = (w.shape[0], w.shape[1]), fmt.grid.span
    whole = fmt.decode(fmt.encode(w, params), params)
    for start in range(0, w.shape[1], span):
        at = fmt.columns(params, shape, start)
        codes = fmt.encode_columns(w[:, start : start + span], at)
        assert codes.shape == (w.shape[0] // fmt.rows_per_code, 1)
        torch.testing.assert_close(fmt.decode_columns(codes, at), whole[:, start : start + span], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_one_group_fitted_anew_leaves_the_others(name: str) -> None:
    scaled = any(p.kind == "scale" for p in parse_format(name).grid.params)
    bare = "-".join(name.split("-")[:2])
    for variant in (name, f"{bare}-dq", f"{bare}-s6", f"{bare}-fp8") if scaled else (name,):
        fmt = parse_format(variant)
        w = weight(fmt, 2, 3, 12)
        shape = (w.shape[0], w.shape[1])
        params = fmt.fit(w)
        same = fmt.refit(params, shape, 16, w[:, 16:32])
        changed = fmt.refit(params, shape, 16, w[:, 16:32] * 0.3)
        assert set(same) == set(changed) == set(params)
        a, b = (Packed.pack(fmt, fmt.encode(w, p), p).dequantize() for p in (params, changed))
        assert torch.equal(a[:, :16], b[:, :16])
        assert torch.equal(a[:, 32:], b[:, 32:])
        if any(p.scope == "block" for p in fmt.grid.params):
            assert not torch.equal(a[:, 16:32], b[:, 16:32])


@pytest.mark.parametrize("name", [n for n in PLAIN if parse_format(n).grid.num_codes < 1 << parse_format(n).grid.code_bits])
def test_a_code_that_stands_for_nothing_is_refused(name: str) -> None:
    fmt = parse_format(name)
    compressed, _ = compress(fmt, weight(fmt, 1, 2, 13))
    tensors = compressed.tensors()
    tensors["term0.codes"] = torch.full_like(tensors["term0.codes"], 255)
    with pytest.raises(FormatError):
        CompressedWeight.build(compressed.spec(), tensors)


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_that_is_not_finite_is_refused(scale: str) -> None:
    fmt = parse_format(f"int4-g16-{scale}")
    compressed, _ = compress(fmt, weight(fmt, 1, 2, 14))
    for name, t in compressed.tensors().items():
        if name == "term0.codes" or (t.dtype == torch.uint8 and scale not in ("e8m0", "fp8", "fp8over")):
            continue
        sick = t.clone()
        sick.view(-1)[0] = torch.nan if t.is_floating_point() else 255 if scale == "e8m0" else 127
        with pytest.raises(FormatError):
            CompressedWeight.build(compressed.spec(), {**compressed.tensors(), name: sick})


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("int9-g64", UsageError, "int8"),
        ("nit4-g64", UsageError, "Did you mean 'int4'"),
        ("e0m0-g64", UsageError, "unknown number grid"),
        ("e7m6-g64", FormatError, "3 to 8 bits"),
        ("e4m3b99-g64", FormatError, "a bias is"),
        ("int4", FormatError, "names no block"),
        ("int4-64", FormatError, "is no block"),
        ("int4-g0", FormatError, "is no block"),
        ("int4-g64-zreo", UsageError, "Did you mean 'zero'"),
        ("int4-g64-fp16-bf16", FormatError, "repeats a part"),
        ("int4-g64-zero-zero", FormatError, "repeats a part"),
        ("nf4-g64-zero", FormatError, "no variant with a zero point"),
        ("nf4-g64-min", FormatError, "no variant with a minimum"),
        ("int4-g64-zero-min", FormatError, "repeats a part"),
        ("int4-g64-base3", FormatError, "3, 9, 27 or 81 levels"),
        ("int4-g64-split", FormatError, "6 bits"),
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
    with pytest.raises(FormatError, match="in_features=576 is not a multiple of 256, the 8 blocks that share a float16"):
        parse_format("q4_k").fit(torch.zeros(2, 576))


def test_a_scale_beyond_half_precision_is_refused() -> None:
    with pytest.raises(NumericsError, match="beyond the range of fp16"):
        parse_format("int2-row").fit(torch.full((1, 8), 1e6))
    assert torch.isfinite(parse_format("int2-row-bf16").fit(torch.full((1, 8), 1e6))["scale"]).all()


def test_short_names_are_whole_formats() -> None:
    for short, name in SHORT.items():
        assert parse_format(short) == parse_format(name)
        assert parse_format(short).name == name


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("q4_0", 4.5), ("q4_1", 5), ("q5_0", 5.5), ("q5_1", 6), ("q8_0", 8.5), ("q2_k", 2.625), ("q3_k", 3.4375)),
        *(
            ("q4_k", 4.5),
            ("q5_k", 5.5),
            ("q6_k", 6.5625),
            ("iq4_nl", 4.5),
            ("iq4_xs", 4.25),
            ("tq2_0", 2.0625),
            ("mxfp4", 4.25),
        ),
    ],
)
def test_types_of_llama_cpp_take_their_bits(name: str, bits: float) -> None:
    assert parse_format(name).nbytes((4096, 4096)) * 8 == bits * 4096**2


@pytest.mark.parametrize("name", ["q4_1", "q4_k", "q2_k"])
def test_a_minimum_is_better_than_a_zero_point_of_as_many_bits(name: str) -> None:
    """Weights of one sign far from 0 in the middle: a zero point wastes the levels on the other side of 0 as a minimum at 0 does."""
    fmt = parse_format(name)
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(21))
    plain = Format(Integer(fmt.grid.code_bits, zero=True), fmt.block, fmt.scale)

    def error(f: Format) -> float:
        params = f.fit(w, shrink=(1.0, 0.9, 0.8))
        return float((f.decode(f.encode(w, params), params) - w).square().sum())

    assert error(fmt) < error(plain)


@pytest.mark.parametrize("scale", [name for name, store in SCALES.items() if isinstance(store, RunCodes)])
def test_a_scale_of_a_run_is_an_integer_times_its_float16(scale: str) -> None:
    store = SCALES[scale]
    assert isinstance(store, RunCodes)
    wanted = torch.rand(3, 2 * store.run, generator=torch.Generator().manual_seed(22)) + 0.1
    wanted[1, store.run :] = 0
    if store.signed:
        wanted[2] *= -1
    outer = store.outer(wanted)
    rounded = store.round(wanted, outer)
    stored = store.pack(rounded, outer)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == store.expected(3, 2 * store.run)
    assert torch.equal(store.unpack(stored, 2 * store.run), rounded)
    step = stored["run"].float().repeat_interleave(store.run, 1)
    codes = torch.where(step > 0, rounded / step, 0.0)
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= store.top
    assert ((rounded - wanted).abs() <= 0.51 * step).all()


def test_a_new_grid_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "toy3", Row(Levels("toy3", (-1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.6, 1.0)), "made up"))
    for name in variants("toy3"):
        fmt = parse_format(name)
        compressed, _ = compress(fmt, weight(fmt, 2, 2, 15))
        rebuilt = CompressedWeight.build(compressed.spec(), compressed.tensors())
        assert torch.equal(rebuilt.dequantize(), compressed.dequantize())
    assert any(row["name"] == "toy3-g64" for row in describe_formats())


def test_the_list_of_formats_agrees_with_the_formats() -> None:
    for row in describe_formats():
        fmt = parse_format(str(row["name"]))
        assert row["bits_per_weight_g64"] == fmt.nbytes((4096, 4096)) * 8 / 4096**2


@pytest.mark.parametrize("name", sorted(UNNAMED_STORES))
def test_an_mx_name_says_its_store_but_in_old_files(name: str) -> None:
    with pytest.raises(FormatError, match=f"use {name}-g32-e8m0"):
        parse_format(f"{name}-g32")
    meant = parse_format(f"{name}-g32-{UNNAMED_STORES[name]}")
    assert meant.name == f"{name}-g32-{UNNAMED_STORES[name]}"
    compressed, _ = compress(meant, torch.randn(4, 64, generator=torch.Generator().manual_seed(18)))
    # A file as an older version wrote it.
    spec = compressed.spec()
    spec["terms"][0]["format"] = f"{name}-g32"
    old = CompressedWeight.build(spec, compressed.tensors())
    assert torch.equal(old.dequantize(), compressed.dequantize())
    assert old.spec() == compressed.spec()


def test_no_other_grid_needs_its_store_said() -> None:
    assert (
        {name for name, row in GRIDS.items() if not row.grid.usual_scale}
        == set(UNNAMED_STORES)
        == {name for name in SHORT if name.startswith("mx")}
    )
