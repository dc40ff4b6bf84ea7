"""Logarithmic levels against the quantizer of their paper."""

import math

import torch

from bitpress.formats import Levels, find_row, parse_format
from bitpress.formats.grids.logarithmic import logarithmic
from bitpress.formats.grids.minifloat import minifloat_levels


def test_levels_of_sqrt_2_are_those_of_the_published_quantizer() -> None:
    # 2^-ceil(k / 2), times sqrt 2 for odd k: a shift and one constant, how the paper's integer units would do it.
    for bits in range(3, 8):
        grid = find_row(f"sqrtlog{bits}").grid
        assert isinstance(grid, Levels)
        for k, level in enumerate(grid.levels[: (1 << (bits - 1)) - 1]):
            assert math.isclose(level, 2.0 ** -math.ceil(k / 2) * (math.sqrt(2) if k % 2 else 1.0), rel_tol=1e-15)


def test_levels_of_2_are_exact_powers_and_those_of_a_float_without_mantissa() -> None:
    assert logarithmic(4) == (
        1,
        0.5,
        0.25,
        0.125,
        1 / 16,
        1 / 32,
        1 / 64,
        0,
        -1,
        -0.5,
        -0.25,
        -0.125,
        -1 / 16,
        -1 / 32,
        -1 / 64,
        0,
    )
    for bits in range(3, 7):
        top = max(minifloat_levels(bits - 1, 0))
        assert sorted(logarithmic(bits)) == sorted(level / top for level in minifloat_levels(bits - 1, 0))


def test_sqrt_2_halves_the_worst_relative_error() -> None:
    w = torch.linspace(0.1, 1.0, 4001)[None]
    worst = {}
    for name in ("log5-row-fp32", "sqrtlog5-row-fp32"):
        fmt = parse_format(name)
        params = fmt.fit(w)
        worst[name] = float(((fmt.decode(fmt.encode(w, params), params) - w).abs() / w).max())
    # In the middle of 1 and r the relative error is (1 - r) / (1 + r): 1/3 for 1/2, 0.1716 for 1/sqrt 2.
    assert abs(worst["log5-row-fp32"] - 1 / 3) < 1e-3
    assert abs(worst["sqrtlog5-row-fp32"] - (math.sqrt(2) - 1) ** 2) < 1e-3


def test_a_block_logarithm_is_a_sign_and_an_exponent_under_a_byte() -> None:
    fmt = parse_format("log4-g16-e8m0")
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    params = fmt.fit(w)
    decoded = fmt.decode(fmt.encode(w, params), params)
    mantissa = torch.frexp(decoded.abs())[0]
    assert set(mantissa.unique().tolist()) <= {0.0, 0.5}
    assert fmt.nbytes((8, 64)) == 8 * 64 // 2 + 8 * 4
