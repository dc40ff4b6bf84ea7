"""Mixtures of tables: the published values of BitMoD, the choice of the best table, and its quality."""

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import Format, Levels, find_row, parse_format
from bitpress.formats.block import Block
from bitpress.formats.grids.bitmod import bitmod
from bitpress.formats.grids.mixture import Mixture
from bitpress.quantizers.rtn import shrink_ratios


def normal(seed: int, rows: int = 32, cols: int = 256) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def error(fmt: Format, w: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    params = fmt.fit(w, importance)
    return (fmt.decode(fmt.encode(w, params), params) - w).square()


@pytest.mark.parametrize(("bits", "unit"), [(3, 1), (4, 2)])
def test_the_tables_hold_the_published_values(bits: int, unit: int) -> None:
    plain = {3: {0, 1, 2, 4}, 4: {0, 1, 2, 3, 4, 6, 8, 12}}[bits]
    special = {3: {3, -3, 6, -6}, 4: {10, -10, 16, -16}}[bits]
    signed = plain | {-value for value in plain}
    tables = [{level * unit for level in table.levels} for table in bitmod(bits).tables]
    assert all(len(table) == 1 << bits and table > signed for table in tables)
    assert {(table - signed).pop() for table in tables} == special


def test_minus_zero_is_the_special_value() -> None:
    assert [table.levels[4] for table in bitmod(3).tables] == [3, -3, 6, -6]
    assert [table.levels[8] for table in bitmod(4).tables] == [5, -5, 8, -8]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_block_takes_its_best_table(bits: int, weighted: bool) -> None:
    w = normal(bits)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)).square() if weighted else torch.ones(256)
    block = Block(1, 64)

    def by_block(fmt: Format) -> torch.Tensor:
        # float32 scales: the choice is made before the scale is rounded.
        fmt = Format(fmt.grid, block, "fp32")
        return (error(fmt, w, importance) * importance).reshape(32, 4, 64).sum(-1)

    grid = find_row(f"bitmod{bits}").grid
    assert isinstance(grid, Mixture)
    singles = torch.stack([by_block(Format(table, block)) for table in grid.tables])
    torch.testing.assert_close(by_block(Format(grid, block)), singles.amin(0))
    assert len(singles.argmin(0).unique()) == 4


@pytest.mark.parametrize("bits", [3, 4])
def test_the_scale_of_bitmod_reaches_the_largest_level_of_either_side(bits: int) -> None:
    """As in the public code; a table that ends later on one side clips weights on the other."""
    fmt = parse_format(f"bitmod{bits}-g64-fp32")
    assert isinstance(fmt.grid, Mixture)
    w = normal(4)
    params = fmt.fit(w)
    largest = torch.tensor([max(abs(level) for level in table.levels) for table in fmt.grid.tables])
    expected = w.reshape(32, 4, 64).abs().amax(-1) / largest[params["which"].long()]
    assert torch.equal(params["scale"], expected)


@pytest.mark.parametrize(("bits", "plain", "searched"), [(3, 0.0385, 0.0332), (4, 0.0098, 0.0088)])
def test_the_error_of_bitmod_is_that_of_its_public_code(bits: int, plain: float, searched: float) -> None:
    """Gaussian weights in groups of 128: the public 3 bits leave 0.0380, and 0.0328 with this search."""
    fmt, w = parse_format(f"bitmod{bits}-g128"), normal(9, 64, 2048)
    assert float(error(fmt, w).sum() / w.square().sum()) < plain
    params = fmt.fit(w, shrink=shrink_ratios("mse", 20, 0.5))
    assert float((fmt.decode(fmt.encode(w, params), params) - w).square().sum() / w.square().sum()) < searched


@pytest.mark.parametrize("native", ["on", "off"])
@pytest.mark.parametrize("name", ["bitmod3-g32", "pow4-g32-s4", "fp6s-g32-e8m0"])
def test_a_search_finds_the_best_pair_of_table_and_scale(name: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native == "off":
        monkeypatch.setenv("BITPRESS_NATIVE", "off")
    fmt, w = parse_format(name), normal(10, 8)
    ratios = shrink_ratios("mse", 6, 0.6)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(11))
    params = fmt.fit(w, importance, ratios)
    assert isinstance(fmt.grid, Mixture)
    outer = {part: params[f"scale_{part}"] for part in fmt.store.expected(1, 1) if part}

    def errors(which: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        trial = {"which": which, "scale": scale}
        return fmt.to_blocks((fmt.decode(fmt.encode(w, trial), trial) - w).square() * importance).sum(-1)

    found = errors(params["which"], params["scale"])
    for index, table in enumerate(fmt.grid.tables):
        for ratio in ratios:
            scale = fmt.store.round(table.fit(fmt.to_blocks(w) * ratio)["scale"].reshape(8, -1), outer)
            assert (found <= errors(torch.full_like(params["which"], index), scale) * (1 + 1e-5)).all()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("bits", "most"), [(3, 0.8), (4, 0.95)])
def test_bitmod_beats_integers_in_groups_of_128(bits: int, most: float, heavy: bool) -> None:
    w = normal(2, 128, 1024)
    w = w * normal(3, 128, 1024).abs() if heavy else w
    mixed, integer = (float(error(parse_format(f"{name}{bits}-g128"), w).sum()) for name in ("bitmod", "int"))
    assert mixed < most * integer


def test_the_choice_costs_two_bits_a_block() -> None:
    assert parse_format("bitmod3-g128").nbytes((16, 1024)) == 16 * 1024 * 3 // 8 + 16 * 8 * 2 + 16 * 8 * 2 // 8


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ((Levels("a", (-1.0, 1.0)),) * 3, "2, 4, 8 or 16 tables"),
        ((Levels("a", (-1.0, 1.0)), Levels("b", (-1.0, 0.0, 1.0))), "one width"),
        ((Levels("a", (-1.0, float("nan"), 0.0, 1.0)), Levels("b", (-1.0, 0.0, float("nan"), 1.0))), "the same invalid codes"),
        ((Levels("a", (-1.0, 1.0)), Levels("b", (-1.0, 2.0), usual_scale="fp32")), "the same scale store"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(tables: tuple[Levels, ...], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        Mixture("odd", tables)


def test_a_code_unused_in_all_tables_is_refused() -> None:
    mixture = Mixture("short", (Levels("a", (-1.0, 0.0, 1.0)), Levels("b", (-2.0, 0.0, 1.0))))
    assert mixture.num_codes == 3
    mixture.check(torch.tensor([2], dtype=torch.uint8))
    with pytest.raises(FormatError):
        mixture.check(torch.tensor([3], dtype=torch.uint8))


@pytest.mark.parametrize("native", ["on", "off"])
@pytest.mark.parametrize("name", ["bitmod4", "fp4s", "fp8s", "pow3", "iq3k"])
def test_codes_are_those_of_the_table_of_the_block(name: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole blocks and of single columns; with zeros of both signs, values half way between levels, and a block of zeros."""
    if native == "off":
        monkeypatch.setenv("BITPRESS_NATIVE", "off")
    w = normal(12, 32, 64)
    w[:, ::7], w[:, 1::7] = 0.0, -0.0
    w[3] = 0.0
    w[5] = torch.randint(-8, 9, (64,), generator=torch.Generator().manual_seed(13)) / 8
    fmt = parse_format(f"{name}-g16")
    params = fmt.fit(w)
    assert isinstance(fmt.grid, Mixture)
    codes = fmt.to_blocks(fmt.encode(w, params))
    scale, which = params["scale"].reshape(-1, 1), params["which"].reshape(-1, 1)
    assert len(which.unique()) > 1
    for index, table in enumerate(fmt.grid.tables):
        here = which[:, 0] == index
        assert torch.equal(codes[here], table.encode(fmt.to_blocks(w)[here], {"scale": scale[here]}))
    column = fmt.grid.encode(w[:, 17:18], fmt.columns(params, (32, 64), 17))
    assert torch.equal(column, fmt.encode(w, params)[:, 17:18])
