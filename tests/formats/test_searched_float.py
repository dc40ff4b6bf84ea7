"""Searched floats: the tables are minifloats, and every block's choice is the best of them."""

import pytest
import torch

from bitpress.formats import find_row, parse_format
from bitpress.formats.grids.minifloat import minifloat_levels
from bitpress.formats.grids.mixture import Mixture

TABLES = {4: ("e1m2", "e2m1", "e3m0"), 6: ("e1m4", "e2m3", "e3m2", "e4m1"), 8: ("e2m5", "e3m4", "e4m3", "e5m2")}


def block_errors(name: str, w: torch.Tensor) -> torch.Tensor:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return (fmt.decode(fmt.encode(w, params), params) - w).square().reshape(-1, 32).sum(-1)


@pytest.mark.parametrize("bits", TABLES)
def test_tables_are_minifloats_by_the_same_codes(bits: int) -> None:
    grid = find_row(f"fp{bits}s").grid
    assert isinstance(grid, Mixture)
    for name, table in zip(TABLES[bits], grid.tables, strict=False):
        levels = torch.tensor(minifloat_levels(int(name[1]), int(name[3]))).double()
        ratio = torch.tensor(table.levels).double() / levels
        assert ratio[1:].nan_to_num(nan=float(ratio[1])).unique().numel() == 1
        assert 1 <= max(table.levels) < 2


@pytest.mark.parametrize("bits", [4, 6])
def test_every_block_is_at_least_as_good_as_under_any_one_table(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(64, 256, generator=generator)
    w[32:] *= torch.randn(32, 256, generator=generator).exp()
    searched = block_errors(f"fp{bits}s-g32-fp32", w)
    single = torch.stack([block_errors(f"{name}-g32-fp32", w) for name in TABLES[bits]])
    # Scales differ in the last bit, where a table's own largest level is no power of two.
    assert torch.all(searched <= single.amin(0) * (1 + 1e-4))
    assert searched.sum() < 0.97 * single.sum(-1).min()
    which = parse_format(f"fp{bits}s-g32").fit(w)["which"]
    assert which.unique().numel() >= 3
