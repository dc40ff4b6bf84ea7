"""Pyramid vector quantization: the numbers of points, the list both ways, the nearest direction, a length a vector."""

import itertools
import math

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import parse_format
from bitpress.formats.grids.pyramid import LISTED, Pyramid


# Fischer's recursion by hand for small ones; 4 k^2 + 2 points for three numbers, 8 k (k^2 + 2) / 3 for four; RFC 6716 counts the same.
@pytest.mark.parametrize(
    ("dim", "pulses", "count", "bits"),
    [
        (2, 7, 28, 5),
        (3, 2, 18, 5),
        (3, 5, 102, 7),
        (4, 4, 192, 8),
        (4, 11, 3608, 12),
        (8, 1, 16, 4),
        (8, 2, 128, 7),
        (8, 5, 9424, 14),
    ],
)
def test_there_are_as_many_points_as_published(dim: int, pulses: int, count: int, bits: int) -> None:
    grid = Pyramid(dim, pulses)
    assert (grid.num_codes, grid.code_bits) == (count, bits)
    points = grid.points(torch.arange(count))
    assert len(points.unique(dim=0)) == count
    assert torch.all(points.abs().sum(-1) == pulses)


@pytest.mark.parametrize(("dim", "pulses"), [(2, 9), (3, 4), (4, 3), (5, 2)])
def test_the_list_is_in_the_documented_order(dim: int, pulses: int) -> None:
    def place(point: tuple[int, ...]) -> list[int]:
        return [2 * abs(x) - (x > 0) for x in point]

    every = itertools.product(range(-pulses, pulses + 1), repeat=dim)
    expected = sorted((p for p in every if sum(map(abs, p)) == pulses), key=place)
    grid = Pyramid(dim, pulses)
    assert grid.points(torch.arange(grid.num_codes)).tolist() == [list(p) for p in expected]


@pytest.mark.parametrize(("dim", "pulses"), [(8, 5), (4, 28), (16, 3), (24, 2), (2, 32)])
def test_every_code_is_found_again(dim: int, pulses: int) -> None:
    grid = Pyramid(dim, pulses)
    codes = torch.arange(grid.num_codes)
    values = grid.decode(codes, {"scale": torch.tensor(0.37)})
    torch.testing.assert_close(values.view(-1, dim).norm(dim=-1), torch.full((len(codes),), 0.37))
    again = grid.decode(grid.encode(values, {"scale": torch.tensor(0.37)}), {"scale": torch.tensor(0.37)})
    # Points in one direction, such as (2, 2) and (1, 1), are never both there: their sums differ.
    torch.testing.assert_close(again, values, rtol=0, atol=0)
    assert torch.equal(grid.encode(values, {"scale": torch.ones(1)}).long(), codes)


def test_decoding_without_a_list_is_the_same() -> None:
    grid = Pyramid(8, 8)
    assert grid.num_codes > LISTED
    codes = torch.arange(0, grid.num_codes, 7)
    points = grid.points(codes).double()
    values = grid.decode(codes, {"scale": torch.tensor(2.0)}).view(-1, 8).double()
    torch.testing.assert_close(values, 2 * points / points.norm(dim=-1, keepdim=True), rtol=1e-6, atol=0)
    assert torch.equal(grid.encode(values.float(), {"scale": torch.ones(1)}).view(-1).long(), codes)


@pytest.mark.parametrize(("dim", "pulses"), [(8, 4), (4, 11), (16, 2), (5, 6)])
def test_the_nearest_direction_of_all_is_found(dim: int, pulses: int) -> None:
    grid = Pyramid(dim, pulses)
    vectors = torch.randn(200, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = grid.points(torch.arange(grid.num_codes)).double()
    best = (vectors @ (points / points.norm(dim=-1, keepdim=True)).T).max(-1).values
    one = {"scale": torch.ones(1)}
    found = (grid.decode(grid.encode(vectors.float(), one), one) * vectors).sum(-1)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-6)


def test_the_scale_has_the_least_squared_error() -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(32, 64, generator=torch.Generator().manual_seed(3))
    grid = Pyramid(8, 5)
    for weights in (None, importance):
        scale = grid.fit(w, weights)["scale"]

        def error(ratio: float, scale: torch.Tensor = scale, weights: torch.Tensor | None = weights) -> torch.Tensor:
            difference = (grid.decode(grid.encode(w, {"scale": scale * ratio}), {"scale": scale * ratio}) - w).square()
            return (difference if weights is None else difference * weights).sum(-1)

        assert torch.all(error(1.0) < error(0.97))
        assert torch.all(error(1.0) < error(1.03))


def test_a_length_for_each_vector_is_what_directions_need() -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))

    def error(name: str) -> float:
        fmt = parse_format(name)
        params = fmt.fit(w)
        return float((fmt.decode(fmt.encode(w, params), params) - w).square().mean())

    # At 2 bits a direction of four loses 5.5% of the power; a shared length loses a tenth more, the spread of lengths.
    exact, six_bits, shared = error("pvq4k4-g4-fp32"), error("pvq4k4-g4"), error("pvq4k4-g64")
    assert exact == pytest.approx(0.0555, rel=0.05)
    assert exact < six_bits < exact * 1.02
    spread = 1 - (math.sqrt(2) * math.gamma(2.5) / math.gamma(2)) ** 2 / 4  # of the length of four normal numbers
    assert shared == pytest.approx(exact + spread * (1 - exact), rel=0.1)


@pytest.mark.parametrize("name", ["pvq1k4-g8", "pvq33k1-row", "pvq8k33-g8", "pvq8k20-g8"])
def test_what_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=r"N must be 2 to 32|at most 24"):
        parse_format(name)
