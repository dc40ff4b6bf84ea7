"""Mixtures of tables: the published values of BitMoD, the choice of the best table, and its quality."""

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import Format, Levels, find_row, parse_format
from bitpress.formats.block import Block
from bitpress.formats.grids.bitmod import bitmod
from bitpress.formats.grids.mixture import Mixture


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
