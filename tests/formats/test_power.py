"""Power functions: the first exponent is the integers, and the search finds what a distribution wants."""

import pytest
import torch

from bitpress.formats import Params, find_row, parse_format
from bitpress.formats.grids.mixture import Mixture
from bitpress.formats.grids.power import EXPONENTS, WIDE, power


def error(name: str, w: torch.Tensor) -> tuple[float, Params]:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return float((fmt.decode(fmt.encode(w, params), params) - w).square().mean()), params


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_powers_of_evenly_spaced_numbers(bits: int) -> None:
    grid = find_row(f"pow{bits}").grid
    assert isinstance(grid, Mixture)
    half = 2 ** (bits - 1)
    evenly = torch.arange(-half, half, dtype=torch.float64) / half
    for exponent, table in zip(EXPONENTS, grid.tables, strict=True):
        expected = evenly.sign() * evenly.abs().pow(exponent)
        torch.testing.assert_close(torch.tensor(table.levels, dtype=torch.float64), expected, rtol=1e-14, atol=0)


def test_the_first_exponent_is_the_integers() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    integers, grid = parse_format("int4-g64-fp32"), power(4, "pow4", EXPONENTS)
    scale = integers.fit(w)["scale"]
    codes = integers.encode(w, {"scale": scale})
    params = {"scale": scale * 8, "which": torch.zeros_like(scale)}
    assert torch.equal(grid.encode(w, params), codes)
    assert torch.equal(grid.decode(codes, params), integers.decode(codes, {"scale": scale}))


def test_the_search_follows_the_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    flat = torch.rand(64, 256, generator=generator) * 2 - 1
    gaussian = torch.randn(64, 256, generator=generator)
    heavy = gaussian * torch.randn(64, 256, generator=generator).exp()
    chosen = {}
    for name, w in {"flat": flat, "gaussian": gaussian, "heavy": heavy}.items():
        found, params = error("pow4-row", w)
        integers, _ = error("int4-row", w)
        chosen[name] = float(torch.tensor(EXPONENTS)[params["which"].long()].mean())
        assert found <= integers * (1 + 1e-3)
        if name != "flat":
            assert found < 0.8 * integers
    assert chosen["flat"] < 1.05 < chosen["gaussian"] < 1.9 < chosen["heavy"]


def test_one_exponent_can_serve_a_whole_layer() -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    _, params = error("pow4-tensor", w)
    assert params["which"].shape == (1, 1)
    # Three bits for the exponent, sixteen for the scale.
    assert parse_format("pow4-tensor").nbytes((32, 64)) == 32 * 32 + 1 + 2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_with_heavy_tails_takes_an_exponent_beyond_those_of_pow(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=generator) * (1.5 * torch.randn(64, 256, generator=generator)).exp()
    (narrow, _), (wide, params) = (error(f"{name}{bits}-tensor-fp32", w) for name in ("pow", "nupes"))
    assert WIDE[int(params["which"])] > EXPONENTS[-1]
    assert wide < 0.95 * narrow
    # The power of the published form is the reciprocal.
    table = find_row(f"nupes{bits}").grid.tables[8]  # type: ignore[attr-defined]
    assert table.levels[0] == -1
    assert table.levels[1] == -((1 - 2.0 ** (1 - bits)) ** 3)
