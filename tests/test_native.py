"""The native library: every function against its reference, hostile arguments, the same bits for any number of threads."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from bitpress import library, native
from bitpress.calibration import Stats, StatsCollector
from bitpress.errors import KernelUnavailable, NumericsError
from bitpress.formats import GRIDS, Tabled, parse_format
from bitpress.formats.grids.additive_book import beam_search
from bitpress.formats.grids.nearest import nearest
from bitpress.formats.layouts import dense as dense
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rtn import shrink_ratios
from bitpress.quantizers.table import QUANTIZERS

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
needs_amx = pytest.mark.skipif("amx-bf16" not in native.features(), reason="this processor has no AMX")


Levels = native.EvenLevels | native.LevelTable


def table_of(name: str) -> native.LevelTable:
    grid = GRIDS[name].grid
    assert isinstance(grid, Tabled)
    assert grid.table is not None
    return grid.table


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference_round(
    w: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, levels: Levels, group: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same loop, one elementary operation at a time, so that nothing is fused and the bits can be compared."""
    codes, errors, kept = torch.empty(w.shape, dtype=torch.uint8), torch.empty_like(w), torch.empty_like(w)
    for c in range(len(w)):
        s = scale[group[c]]
        scaled = w[c] / torch.where(s == 0, 1.0, s)
        if isinstance(levels, native.LevelTable):
            codes[c], level = nearest_level(scaled, levels)
        else:
            z = levels.zero[group[c]] if isinstance(levels.zero, torch.Tensor) else levels.zero
            code = (scaled.round() + z).clamp(0, levels.top)
            codes[c], level = code.to(torch.uint8), code - z
        difference = w[c] - level * s
        kept[c] = torch.where(difference.abs() > least[c], difference, 0.0).half()
        errors[c] = (difference - kept[c]) / factor[c, c]
        w[c + 1 :] -= errors[c] * factor[c, c + 1 :, None]
    return codes, errors, kept


def nearest_level(scaled: torch.Tensor, table: native.LevelTable) -> tuple[torch.Tensor, torch.Tensor]:
    rank = (scaled[:, None] > table.boundaries).sum(1)
    codes = table.code_of[rank]
    if table.zeros is not None:
        zero, negative = table.zeros
        codes = torch.where((codes == zero) & torch.signbit(scaled), negative, codes.int()).to(torch.uint8)
    return codes, table.levels[rank]


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("cols", [1, 2, 17, 128])
@pytest.mark.parametrize("kind", ["zeros", "symmetric", "e2m1", "e4m3", "nf4"])
@pytest.mark.parametrize("apart", [True, False])
def test_columns_are_rounded_as_the_reference_rounds_them(rows: int, cols: int, kind: str, apart: bool) -> None:
    w = draw(cols, rows)
    factor = torch.triu(draw(cols, cols, seed=1) * 0.1) + torch.eye(cols)
    scale = draw(3, rows, seed=2).abs() * 0.2
    scale[1, 0] = 0.0  # a block of zeros
    levels: Levels
    if kind in ("zeros", "symmetric"):
        levels = native.EvenLevels(draw(3, rows, seed=3).abs().mul(4).round() if kind == "zeros" else 8.0, 15)
    else:
        levels = table_of(kind)
    group = torch.arange(cols) % 3
    whole = torch.zeros(cols + 5, cols + 5)
    whole[2 : 2 + cols, 3 : 3 + cols] = factor  # a view with a stride, as the caller has it
    expected_w = w.clone()
    least = draw(cols, rows, seed=4).abs() if apart else torch.full((cols, rows), math.inf)
    expected = reference_round(expected_w, factor, scale, levels, group, least)
    assert bool(expected[2].any()) == apart or cols * rows < 40
    for count in (1, 2, 3):
        got_w = w.clone()
        with threads(count):
            got = native.round_columns_(
                got_w, whole[2 : 2 + cols, 3 : 3 + cols], scale, levels, group, least if apart else None
            )
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert (got[2] is not None) == apart
        assert got[2] is None or torch.equal(got[2], expected[2])
        assert torch.equal(got_w, expected_w)


@pytest.mark.parametrize(
    "name", ["int4-g16-zero", "int3-row", "int2-tensor-zero", "int8-2x16-zero", "nvfp4", "nf4-g16", "e4m3-row"]
)
@pytest.mark.parametrize("groups", ["static", "running"])
@pytest.mark.parametrize("order", ["activation", "natural"])
def test_gptq_is_as_good_with_native_code_as_without(
    name: str, groups: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = draw(48, 64), draw(300, 64, seed=1) * torch.linspace(0.1, 3, 64)
    collector = StatsCollector({"gram"}, 64)
    collector.add(x, "here")
    stats = collector.finish()
    gptq = QUANTIZERS["gptq"](groups=groups, order=order)
    with_native = gptq.quantize(w, stats, parse_format(name)).weight
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    assert not native.available()
    without = gptq.quantize(w, stats, parse_format(name)).weight
    # Sums in another order: a weight at the middle between two levels may fall to the other side, and what follows with it.
    a, b = (output_error(w, v.dequantize(), stats) for v in (with_native, without))
    assert a == pytest.approx(b, rel=0.02)
    rounded = QUANTIZERS["rtn"](clip="mse").quantize(w, None, parse_format(name)).weight
    assert a < output_error(w, rounded.dequantize(), stats)


@pytest.mark.parametrize(("name", "weights"), [("spqr", "int3-g16-zero"), ("pb_llm", "int2-g16"), ("pb_llm", "binary-g16")])
def test_weights_kept_apart_are_the_same_with_native_code(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = draw(48, 64) ** 3, draw(300, 64, seed=1) * torch.linspace(0.1, 3, 64)
    stats = Stats(300, gram=x.T @ x / 300)
    quantizer = QUANTIZERS[name](**({"store": "fp16", "salient": 0.02} if name == "pb_llm" else {}))
    with_native = quantizer.quantize(w, stats, parse_format(weights)).weight
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    without = quantizer.quantize(w, stats, parse_format(weights)).weight
    assert with_native.nbytes == pytest.approx(without.nbytes, rel=0.02)
    assert len(with_native.terms) == 2
    torch.testing.assert_close(with_native.terms[1].dequantize(), without.terms[1].dequantize(), rtol=0.01, atol=0.3)
    a, b = (output_error(w, v.dequantize(), stats) for v in (with_native, without))
    assert a == pytest.approx(b, rel=0.02)


@needs_amx
@pytest.mark.parametrize("features", [1, 16, 31, 32, 33, 100, 576])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 512, 700])
def test_gram_of_bf16_matches_float64(features: int, tokens: int) -> None:
    x = draw(tokens, features).bfloat16()
    size = native.gram_size(features)
    expected = x.double().T @ x.double()
    grams = []
    for count in (1, 2, 3):
        gram = torch.zeros(size, size)
        with threads(count):
            native.add_gram_(gram, x)
        grams.append(gram)
        # Every product is exact; each addition rounds once.
        bound = (tokens + 2) * 2.0**-24 * (x.double().abs().T @ x.double().abs())
        assert ((gram[:features, :features].double() - expected).abs() <= bound).triu().equal(torch.ones_like(bound).triu() > 0)
    assert torch.equal(grams[0], grams[1])
    assert torch.equal(grams[0], grams[2])


@needs_amx
@pytest.mark.parametrize("features", [1, 31, 33, 576])
@pytest.mark.parametrize("tokens", [1, 33, 512, 700])
def test_product_of_two_bf16_matrices_matches_float64(features: int, tokens: int) -> None:
    a, b = draw(tokens, features).bfloat16(), draw(tokens, features, seed=1).bfloat16()
    size = native.gram_size(features)
    expected, bound = a.double().T @ b.double(), (tokens + 2) * 2.0**-24 * (a.double().abs().T @ b.double().abs())
    totals = []
    for count in (1, 2, 3):
        total = torch.zeros(size, size)
        with threads(count):
            native.add_product_(total, a, b)
        totals.append(total)
        assert bool(((total[:features, :features].double() - expected).abs() <= bound).all())
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
    assert not bool(totals[0][features:].any())
    assert not bool(totals[0][:, features:].any())


@needs_amx
def test_the_difference_from_the_original_goes_through_native_code_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, original = draw(3, 40, 70).bfloat16(), draw(3, 40, 70, seed=1).bfloat16()

    def collect() -> torch.Tensor:
        collector = StatsCollector({"gram", "cross"}, 70)
        for given, true in zip(x, original, strict=True):
            collector.add(given, "layer")
            collector.add_original(given, true)
        cross = collector.finish().cross
        assert cross is not None
        return cross

    fast = collect()
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    assert torch.allclose(fast, collect(), rtol=1e-5, atol=1e-5)


@needs_amx
def test_the_collector_takes_bf16_through_native_code_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(3, 40, 70).bfloat16()

    def collect() -> torch.Tensor:
        collector = StatsCollector({"gram"}, 70)
        for batch in x:
            collector.add(batch, "here")
        return collector.finish().need_gram("here")

    with_native = collect()
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    torch.testing.assert_close(with_native, collect(), rtol=1e-5, atol=1e-6)
    assert torch.equal(with_native, with_native.T)


def round_arguments() -> dict[str, object]:
    return {
        "w": draw(4, 6),
        "factor": torch.eye(4),
        "scale": torch.ones(2, 6),
        "levels": native.EvenLevels(torch.zeros(2, 6), 15),
        "group": torch.tensor([0, 0, 1, 1]),
    }


def long_table(boundaries: int, levels: int, codes: int) -> native.LevelTable:
    return native.LevelTable(torch.zeros(boundaries), torch.zeros(levels), torch.zeros(codes, dtype=torch.uint8), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("w", torch.zeros(4, 6, dtype=torch.float64)),
        ("w", torch.zeros(6, 4).T),
        ("w", torch.zeros(4)),
        ("factor", torch.zeros(4, 3)),
        ("factor", torch.arange(32.0).view(4, 8)[:, ::2]),
        ("scale", torch.ones(2, 5)),
        ("levels", native.EvenLevels(torch.zeros(1, 6), 15)),
        ("levels", native.EvenLevels(0.0, 256)),
        ("levels", native.EvenLevels(0.0, -1)),
        ("levels", long_table(256, 257, 257)),
        ("levels", long_table(3, 3, 4)),
        ("levels", long_table(3, 4, 3)),
        ("group", torch.tensor([0, 0, 1, 2])),
        ("group", torch.tensor([0, 0, 1, -1])),
        ("group", torch.tensor([0, 0, 1])),
        ("group", torch.tensor([0.0, 0, 1, 1])),
        ("least", torch.ones(4, 5)),
        ("least", torch.ones(4)),
        ("least", torch.ones(6, 4).T),
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_touched(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        native.round_columns_(**{**round_arguments(), name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [32, 96, 63])
def test_a_gram_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="gram"):
        native.add_gram_(torch.zeros(size, size), torch.zeros(5, 64, dtype=torch.bfloat16))


def test_a_product_of_matrices_that_do_not_fit_is_refused() -> None:
    a, total = torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    for sum_, left, right in ((torch.zeros(96, 96), a, a.clone()), (total, a, a), (total, a, a[:4].clone())):
        with pytest.raises(ValueError, match=r"sum|two matrices|one shape"):
            native.add_product_(sum_, left, right)


SCALAR = [name for name in GRIDS if GRIDS[name].grid.span == 1 and GRIDS[name].grid.code_bits <= 8]


@pytest.mark.parametrize(
    "name", [GRIDS[g].in_block(b) for g in SCALAR for b in ("g1", "g7", "g64", "row", "2x8")] + ["int4-g64-zero"]
)
def test_codes_and_values_are_those_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = parse_format(name)
    w = draw(6, 448, seed=5)
    w[0, :64] = 0.0
    w[1, :8] = torch.tensor([-0.0, 0.0, 1e-30, -1e-30, 3.0, -3.0, 0.5, -0.5])
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    values = fmt.decode(codes, params)
    monkeypatch.setenv("BITPRESS_NATIVE", "on")
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(fmt.encode(w, params), codes)
            again = fmt.decode(codes, params)
            assert torch.equal(again, values)
            assert torch.equal(torch.signbit(again), torch.signbit(values))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ratios", [(1.0,), shrink_ratios("mse", 20, 0.5)])
@pytest.mark.parametrize(
    "name",
    [
        "int4-g64-zero",
        "int3-g21",
        "int2-g14-zero-bf16",
        "int8-row",
        "int4-tensor-zero-fp32",
        "int1-g6-zero",
        "int4-2x42",
        "int3-g14-zero-s4",
        "int4-2x42-s8",
        "e2m1-g14-fp8",
        "e2m1-g42-e8m0",
        "mxfp4-g42-fp16",
        "mxfp6-2x42-fp16",
        "nf4-g18",
        "nf4-g6-dq",
        "iq4nl-tensor",
        "e4m3-row-p2row",
        "pow4-row-bf16",
    ],
)
def test_ranges_are_those_that_the_reference_finds(
    name: str, ratios: tuple[float, ...], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = 128 if "g64" in name else 126
    w = draw(96, columns) * torch.exp(draw(columns, seed=1))
    w[3] = 0.0  # blocks of zeros
    w[4] *= 1e-9  # scales below the smallest half float
    w[5] = w[5].abs()  # a range on one side of 0
    importance = draw(96, columns, seed=2).square() if weighted else None
    fmt = parse_format(name)
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(fmt.fit(w, importance, ratios))
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    expected = fmt.fit(w, importance, ratios)
    assert set(found[0]) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[0][key], found[1][key])
        assert found[0][key].shape == value.shape
        # Sums are taken in another order, so that of two ratios that are equally good either may be kept.
        assert float((found[0][key] == value).float().mean()) > 0.99
    weights = torch.ones(()) if importance is None else importance
    errors = [((fmt.decode(fmt.encode(w, p), p) - w).double().square() * weights).sum() for p in (found[0], expected)]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=1e-6)


@pytest.mark.parametrize("name", ["int4-g14-zero", "int3-g14-zero-s4"])
def test_ranges_found_anew_keep_what_blocks_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = draw(64, 126) * torch.exp(draw(126, seed=1))
    w[3] = 0.0
    fmt, ratios = parse_format(name), shrink_ratios("mse", 20, 0.5)
    shared = fmt.fit(w)
    # Larger than what was shared out for, so that steps end at their largest code.
    found = fmt.fit(2 * w.roll(1, 0), None, ratios, shared=shared)
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    expected = fmt.fit(2 * w.roll(1, 0), None, ratios, shared=shared)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert float((found[key] == value).float().mean()) > 0.99
    for part in set(shared) - {p.name for p in fmt.grid.params}:
        assert torch.equal(found[part], shared[part])


@pytest.mark.parametrize("kept", native.SCALE_TYPES)
def test_scales_are_rounded_as_torch_rounds_them(kept: torch.dtype) -> None:
    """Of blocks whose one weight is the scale itself: of all sizes, ties of half floats and denormal ones among them."""
    halves = torch.arange(1, 0x7BFF, dtype=torch.int16).view(torch.float16).float()
    scales = torch.cat([halves, (halves[1:] + halves[:-1]) / 2, torch.exp(8 * draw(20000)), torch.tensor([1e-40, 65519.0])])
    scales = scales[scales < 65520]
    scale, zero, good = native.search_ranges(scales[:, None], None, (1.0,), 1, with_zero=True, kept=kept)
    rounded = scales.to(kept).float()
    smallest = float(torch.finfo(kept).smallest_normal * torch.finfo(kept).eps)
    assert good
    assert zero is not None
    assert not zero.any()
    assert torch.equal(scale[:, 0], torch.where(rounded == 0, smallest, rounded))


def test_a_scale_beyond_its_type_is_told() -> None:
    w = torch.full((2, 4), 1e6)
    assert not native.search_ranges(w, None, (1.0, 0.01), 15, with_zero=True, kept=torch.float16)[2]
    assert native.search_ranges(w, None, (1.0, 0.01), 15, with_zero=True, kept=torch.bfloat16)[2]
    with pytest.raises(NumericsError, match="beyond the range of fp16"):
        parse_format("int4-g4-zero").fit(w)


@pytest.mark.parametrize("shape", [(1, 256, 8), (2, 100, 4), (2, 16, 1), (3, 33, 6), (4, 7, 2)], ids=str)
@pytest.mark.parametrize("width", [1, 5, 40])
def test_words_of_sums_are_those_of_the_reference(
    shape: tuple[int, int, int], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, words = draw(900, shape[2]), draw(*shape, seed=1)

    def distance(codes: torch.Tensor) -> torch.Tensor:
        return (vectors - sum(book[code] for book, code in zip(words, codes, strict=True))).double().square().sum(1)

    found = []
    for count in (1, 3):
        with threads(count):
            found.append(beam_search(vectors, words, width))
    assert torch.equal(*found)
    one = nearest(vectors, words[0])
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    expected = beam_search(vectors, words, width)
    assert found[0].dtype == expected.dtype
    # Of two beginnings that are equally good either may be kept.
    assert float((found[0] == expected).all(0).float().mean()) > 0.99
    assert float(distance(found[0]).sum()) == pytest.approx(float(distance(expected).sum()), rel=1e-4)
    assert float((one == nearest(vectors, words[0])).float().mean()) > 0.999


@pytest.mark.parametrize(("count", "span"), [pytest.param(256, 8, marks=pytest.mark.release), (100, 3), (16, 1), (2, 2)])
def test_words_of_the_nearest_sum_are_those_of_the_reference(count: int, span: int) -> None:
    vectors, words = draw(700, span), draw(2, count, span, seed=1)
    with threads(3):
        found = native.nearest_pairs(vectors, words)
    with threads(1):
        assert torch.equal(found, native.nearest_pairs(vectors, words))
    squares = (vectors[:, None].double() - (words[0][:, None] + words[1][None]).view(1, -1, span)).square().sum(-1)
    taken = squares[torch.arange(700), found[0] * count + found[1]]
    assert torch.allclose(taken, squares.amin(1), rtol=1e-4, atol=1e-6)


def test_words_of_numbers_that_are_not_finite_are_words_all_the_same() -> None:
    vectors, words = draw(50, 3), draw(2, 20, 3, seed=1)
    vectors[::3] = torch.nan
    vectors[1::3] = torch.inf
    words[0, 4] = torch.nan
    words[1, 5] = -torch.inf
    for codes in (native.beam_search(vectors, words, 4), native.nearest_pairs(vectors, words)):
        assert int(codes.min()) >= 0
        assert int(codes.max()) < 20
    assert native.nearest_pairs(vectors[:0], words).shape == (2, 0)
    assert native.beam_search(vectors[:0], words, 4).shape == (2, 0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1000])
def test_packing_is_that_of_the_reference(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 1 << bits, (200, count), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = native.pack_dense(codes, bits)
    assert torch.equal(native.unpack_dense(packed, bits, count), codes)
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    assert torch.equal(dense.pack(codes, bits), packed)
    assert torch.equal(dense.unpack(packed, bits, count), codes)


def test_code_functions_refuse_what_does_not_fit() -> None:
    v, s = torch.zeros(3, 4), torch.ones(3, 1)
    c = torch.zeros(3, 4, dtype=torch.uint8)
    table = torch.zeros(256)
    wrong = [
        lambda: native.encode_affine(v, torch.ones(2, 1), 0.0, 15),
        lambda: native.encode_affine(v, s, torch.zeros(2, 1), 15),
        lambda: native.encode_affine(v, s, 0.0, 256),
        lambda: native.encode_affine(v.double(), s, 0.0, 15),
        lambda: native.search_ranges(v, v[:2], (1.0,), 15, with_zero=True, kept=torch.float16),
        lambda: native.search_ranges(v, None, (), 15, with_zero=True, kept=torch.float16),
        lambda: native.search_ranges(v, None, (1.0,), 1, with_zero=False, kept=torch.float16),
        lambda: native.search_ranges(v, None, (1.0,), 256, with_zero=True, kept=torch.float16),
        lambda: native.search_ranges(v.double(), None, (1.0,), 15, with_zero=True, kept=torch.float16),
        lambda: native.search_ranges(v, None, (1.0,), 15, with_zero=True, kept=native.Steps(s[:2], 15)),
        lambda: native.search_ranges(v, None, (1.0,), 15, with_zero=True, kept=native.Steps(s, 0)),
        lambda: native.search_ranges(v, None, (1.0,), 15, with_zero=True, kept=native.Steps(s.double(), 15)),
        lambda: native.beam_search(v, torch.zeros(2, 5, 3), 4),
        lambda: native.beam_search(v, torch.zeros(0, 5, 4), 4),
        lambda: native.beam_search(v, torch.zeros(2, 0, 4), 4),
        lambda: native.beam_search(v, torch.zeros(2, 5, 4), 0),
        lambda: native.beam_search(v, torch.zeros(2, 5, 4), 5000),
        lambda: native.beam_search(v.double(), torch.zeros(2, 5, 4), 4),
        lambda: native.beam_search(v, torch.zeros(5, 4), 4),
        lambda: native.nearest_pairs(v, torch.zeros(3, 5, 4)),
        lambda: native.nearest_pairs(v, torch.zeros(2, 5, 3)),
        lambda: native.nearest_pairs(v, torch.zeros(2, 5000, 4)),
        lambda: native.decode_affine(c, torch.ones(4, 1), 0.0),
        lambda: native.decode_affine(c.int(), s, 0.0),
        lambda: native.encode_levels(v, s, long_table(2, 3, 2)),
        lambda: native.encode_levels(v, s, long_table(2, 2, 3)),
        lambda: native.encode_levels(v, s, long_table(256, 257, 257)),
        lambda: native.search_scales(v, None, s.T, long_table(2, 3, 2)),
        lambda: native.search_scales(v, None, s.T, long_table(256, 257, 257)),
        lambda: native.search_scales(v, None, s.T[:, :2], long_table(2, 3, 3)),
        lambda: native.search_scales(v, None, s.T[:0], long_table(2, 3, 3)),
        lambda: native.search_scales(v, v[:2], s.T, long_table(2, 3, 3)),
        lambda: native.search_scales(v.double(), None, s.T, long_table(2, 3, 3)),
        lambda: native.decode_levels(c, s, table[:255]),
        lambda: native.pack_dense(c, 9),
        lambda: native.pack_dense(c, 0),
        lambda: native.unpack_dense(c, 4, 9),
        lambda: native.unpack_dense(c.view(torch.int8), 8, 4),
    ]
    for call in wrong:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call()


def test_rows_of_logits_that_do_not_fit_are_refused() -> None:
    p, following, figures = np.zeros((3, 5), np.float32), np.zeros(3, np.int64), np.zeros((3, 4))
    good: dict[str, Any] = {"p": p, "q": p, "following": following, "figures": figures, "threads": 1}
    wrong = [
        {"p": p[:2]},
        {"q": p[:, :4]},
        {"q": p.astype(np.float64)},
        {"q": p.view(np.int32)},
        {"q": p.astype(np.int16)},
        {"p": p[:, ::2], "q": p[:, ::2]},
        {"p": p[:, :0], "q": p[:, :0]},
        {"p": p[0], "q": p[0]},
        {"following": following[:2]},
        {"following": following - 2},
        {"following": following + 5},
        {"following": following.astype(np.int32)},
        {"figures": figures[:, :3]},
        {"figures": np.zeros((4, 4))},
        {"figures": figures.astype(np.float32)},
        {"threads": 0},
    ]
    library.built_library().compare_rows(**good)
    for change in wrong:
        with pytest.raises((ValueError, TypeError)):
            library.built_library().compare_rows(**{**good, **change})


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    library._find_library.cache_clear()
    try:
        assert not native.available()
        with pytest.raises(KernelUnavailable, match="not built for this version"):
            native.pack_dense(torch.zeros(1, 1, dtype=torch.uint8), 4)
    finally:
        library._find_library.cache_clear()
