"""Paths through a trellis: the code, the search, and how a weight's columns hold them."""

import itertools

import pytest
import torch

from bitpress import native
from bitpress.errors import FormatError
from bitpress.formats import parse_format
from bitpress.formats.activation import ActivationFormat
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.formats.grids.trellis import WIDTHS, Trellis, best_path, trellis

DEVICE = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def own_levels(grid: Trellis) -> list[int]:
    """Return the levels in whole numbers, by the rule of the documentation alone."""
    found = []
    for state in range(1 << grid.state_bits):
        t = (state * grid.constants.multiplier % (1 << 16) - (1 << 15)) | 1
        square = (t * t + (1 << 14)) >> 15
        value = grid.constants.polynomial[4]
        for coefficient in grid.constants.polynomial[3::-1]:
            value = ((value * square + (1 << 14)) >> 15) + coefficient
            assert abs(value) < 1 << 15, "the polynomial leaves 16 bits"
        found.append((((value * t + (1 << 14)) >> 15) + 16) >> 5)
    return found


@pytest.mark.parametrize("name", WIDTHS)
def test_levels_are_bytes_by_the_documented_rule(name: str) -> None:
    for state_bits in (10, 14, 16):
        grid = trellis(name, state_bits)
        levels = own_levels(grid)
        assert max(map(abs, levels)) <= 127
        assert (grid.levels(DEVICE) * 32).tolist() == levels


@pytest.mark.parametrize("name", WIDTHS)
def test_a_weight_is_the_level_of_the_newest_bits(name: str) -> None:
    grid = trellis(name, 10)
    shifts = grid.constants.shifts
    codes = torch.randint(grid.num_codes, (3, 40), generator=torch.Generator().manual_seed(1)).int()
    expected = []
    for column in codes.tolist():
        state, values = 0, []
        for code in column:
            left = grid.code_bits
            for shift in shifts:
                left -= shift
                state = (state << shift | (code >> left) % (1 << shift)) % (1 << 10)
                values.append(own_levels(grid)[state] / 32)
        expected.append(values)
    assert torch.equal(grid.decode(codes, {"scale": torch.ones(1, 1)}), torch.tensor(expected))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_finds_the_best_of_all_paths(weighted: bool) -> None:
    grid = Trellis("", WIDTHS["tcq1.5"], 5)
    levels = grid.levels(DEVICE)
    values = normal(4, 6)
    weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else None
    every = torch.cartesian_prod(*(torch.arange(8) for _ in range(3))).to(torch.uint8)
    decoded = grid.decode(every, {"scale": torch.ones(1, 1)})
    error = (values[:, None] - decoded).square()
    least = (error if weights is None else error * weights[:, None]).sum(-1).amin(-1)
    added = best_path(values, weights, 5, (1, 2), levels)
    chosen = grid.decode(grid._joined(added), {"scale": torch.ones(1, 1)})
    own = (values - chosen).square()
    torch.testing.assert_close((own if weights is None else own * weights).sum(-1), least)


@pytest.mark.skipif(not native.available(), reason="no native library here")
@pytest.mark.parametrize(("name", "weighted"), list(itertools.product(WIDTHS, (False, True))))
def test_native_search_finds_the_path_of_the_reference(name: str, weighted: bool) -> None:
    grid = trellis(name, 10)
    values = normal(3, 150)  # more than two times the values between two rebasings of the costs
    weights = torch.rand(3, 150, generator=torch.Generator().manual_seed(2)) if weighted else None
    shifts = grid.constants.shifts
    levels = grid.levels(DEVICE)
    found = native.encode_trellis(values, weights, 10, torch.tensor(shifts, dtype=torch.int32), levels)
    assert torch.equal(found, best_path(values, weights, 10, shifts, levels))


@pytest.mark.skipif(not native.available(), reason="no native library here")
@pytest.mark.parametrize(("name", "sequences"), [("tcq2", 1), ("tcq2", 2), ("tcq2.5", 1), ("tcq5", 3)])
def test_threads_that_share_a_path_find_the_same_one(name: str, sequences: int) -> None:
    """Of 2^14 states, up to four threads take some each where there are fewer paths than threads."""
    grid = trellis(name)
    values = normal(sequences, 130)
    shifts, levels = torch.tensor(grid.constants.shifts, dtype=torch.int32), grid.levels(DEVICE)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4, 7):
            torch.set_num_threads(count)
            found.append(native.encode_trellis(values, None, grid.state_bits, shifts, levels))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(found[0], best_path(values, None, grid.state_bits, grid.constants.shifts, levels))


# Squared error of lattices with a second book at 2, 3 and 4 bits (e8p, e8p + e81b, e8p + e8p), and what any code of a rate leaves at least.
LATTICES = {"tcq2": 0.0910, "tcq3": 0.0293, "tcq4": 0.0086}


@pytest.mark.skipif(not native.available(), reason="too slow without the native library")
@pytest.mark.parametrize("name", WIDTHS)
def test_error_on_normal_weights(name: str) -> None:
    fmt = parse_format(f"{name}-tensor")
    w = normal(1024, 16, seed=3)
    params = fmt.fit(w)
    error = float((fmt.decode(fmt.encode(w, params), params) - w).square().mean() / w.square().mean())
    least = 2.0 ** (-2 * float(name[3:]))
    assert least < error < (1.2 if float(name[3:]) < 3 else 1.6 if float(name[3:]) < 4.5 else 2.1) * least
    assert error < 0.81 * LATTICES.get(name, 9.0)


def test_rows_of_large_scales_count_for_more() -> None:
    fmt = parse_format("tcq2s10-row")
    w = normal(64, 8) * torch.tensor([1.0, 100.0]).repeat(32)[:, None]
    params = fmt.fit(w)
    error = (fmt.decode(fmt.encode(w, params), params) - w).square() / params["scale"].square()
    assert float(error[1::2].mean()) < 0.7 * float(error[::2].mean())


def test_a_code_of_two_rows_needs_an_even_number_of_rows() -> None:
    fmt = parse_format("tcq2.5-row")
    assert fmt.expected((6, 32))["codes"] == (torch.uint8, (3, 20))
    with pytest.raises(FormatError, match=r"out_features=7 is not a multiple of the 2 rows of a code of tcq2.5"):
        fmt.block_grid((7, 32))


def test_a_trellis_has_enough_states_for_its_codes() -> None:
    assert parse_format("tcq2s14-row").name == "tcq2-row"
    assert parse_format("tcq2s12-g16").name == "tcq2s12-g16"
    with pytest.raises(FormatError, match="8 to 16 bits of state"):
        trellis("tcq5", 7)


def test_tokens_cannot_share_a_path() -> None:
    with pytest.raises(FormatError, match="one token would change another"):
        ActivationFormat(parse_format("tcq4-row"))


def test_gradients_pass_a_trellis_straight_through() -> None:
    x = normal(8, 4).requires_grad_()
    fake_quantize(x, parse_format("tcq4s10-row")).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(8, 4))
