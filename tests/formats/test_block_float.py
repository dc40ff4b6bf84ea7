"""Block floats against the arithmetic of their paper, MXINT8 against the format's description."""

import pytest
import torch

from bitpress.formats import Levels, find_row, parse_format
from bitpress.formats.grids.block_float import signed_magnitudes, twos_complement


def weight(seed: int, rows: int = 64, cols: int = 64) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def reference(w: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """The paper's block floating point, in float64: mantissas of bits - 1 under 2^ceil(log2(largest))."""
    blocks = w.double().reshape(-1, block)
    shared = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True))))
    steps = 2 ** (bits - 1)
    mantissa = (blocks.abs() / shared * steps).round().clamp(0, steps - 1) / steps
    return (blocks.sign() * shared * mantissa).reshape(w.shape).float()


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("block", [16, 64])
def test_a_block_float_is_that_of_the_paper(bits: int, block: int) -> None:
    fmt = parse_format(f"bfp{bits}-g{block}")
    w = weight(bits)
    params = fmt.fit(w)
    assert torch.equal(fmt.decode(fmt.encode(w, params), params), reference(w, bits, block))
    assert fmt.nbytes((64, 64)) == 64 * 64 * bits // 8 + 64 * 64 // block


def test_an_exact_power_of_two_is_exact() -> None:
    fmt = parse_format("bfp4-g16")
    w = torch.zeros(1, 16)
    w[0, 3] = -4.0
    params = fmt.fit(w)
    assert torch.equal(fmt.decode(fmt.encode(w, params), params), w)
    assert reference(w, 4, 16)[0, 3] == -3.5


def test_sign_stands_above_the_magnitude() -> None:
    assert signed_magnitudes(4)[:8] == tuple(range(8))
    assert signed_magnitudes(4)[8:] == tuple(-m for m in range(8))


def test_mxint8_is_twos_complement_with_six_places_after_the_point() -> None:
    grid = find_row("mxint8").grid
    assert isinstance(grid, Levels)
    as_bytes = torch.arange(256).to(torch.uint8).view(torch.int8)
    assert torch.equal(torch.tensor(grid.levels), as_bytes.float() * 2**-6)
    assert max(grid.levels) == 1 + 63 / 64
    assert min(twos_complement(8)) == -2.0
    fmt = parse_format("mxint8")
    assert fmt.name == "mxint8-g32-e8m0"
    assert fmt.nbytes((1, 32)) == 33


def test_mxint8_takes_the_largest_power_of_two_below_the_largest_weight() -> None:
    fmt = parse_format("mxint8")
    w = weight(8) * 0.03
    params = fmt.fit(w)
    largest = w.reshape(-1, 32).abs().amax(-1).double()
    assert torch.equal(params["scale"].flatten().double(), torch.exp2(torch.floor(torch.log2(largest))))
    # Half a step of 2^-6, in the scale's units; the largest positive number may be half a step further off, clipped from 2.
    error = (fmt.decode(fmt.encode(w, params), params) - w).abs().reshape(-1, 32) / params["scale"].reshape(-1, 1)
    assert error.max() <= 2**-6
    assert error.quantile(0.99) <= 2**-7


def test_narrower_mantissas_lose_a_factor_of_four_a_bit() -> None:
    w = weight(9, 256, 256)
    errors = []
    for bits in range(4, 9):
        fmt = parse_format(f"bfp{bits}-g16")
        params = fmt.fit(w)
        errors.append(float((fmt.decode(fmt.encode(w, params), params) - w).square().mean()))
    for wide, narrow in zip(errors[1:], errors, strict=False):
        assert 3.7 < narrow / wide < 4.3
