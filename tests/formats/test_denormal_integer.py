"""Integers with denormals: the levels of the paper, and fewer small weights lost."""

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import Format, Packed, Params, parse_format
from bitpress.formats.grids.denormal_integer import DenormalInteger


def decoded(fmt: Format, w: torch.Tensor) -> tuple[torch.Tensor, Params]:
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params).dequantize(), params


def test_four_bits_are_fourteen_whole_levels_and_two_halves() -> None:
    one = {"scale": torch.ones(1)}
    codes = torch.arange(16).to(torch.uint8)
    assert DenormalInteger(4).decode(codes, one).tolist() == [*range(-7, 7), -0.5, 0.5]
    shifted = DenormalInteger(4, zero=True).decode(codes, {**one, "zero": torch.tensor([3.0])})
    assert shifted.tolist() == [*range(-3, 11), -0.5, 0.5]


@pytest.mark.parametrize("bits", range(3, 9))
def test_the_range_is_cut_into_two_to_the_bits_less_three_steps(bits: int) -> None:
    w = torch.tensor([[-0.4, 0.6, 0.1, 0.05]])
    _, params = decoded(parse_format(f"dint{bits}-row-zero-fp32"), w)
    torch.testing.assert_close(params["scale"], torch.tensor([[1.0 / (2**bits - 3)]]), rtol=1e-6, atol=0)


def test_half_a_step_catches_what_would_round_to_zero() -> None:
    scale = {"scale": torch.ones(1)}
    values = torch.tensor([0.0, 0.2, -0.2, 0.3, -0.3, 0.7, -0.7, 0.8, -0.8, 1.2, -9.0, 9.0])
    grid = DenormalInteger(4)
    assert grid.decode(grid.encode(values, scale), scale).tolist() == [0, 0, 0, 0.5, -0.5, 0.5, -0.5, 1, -1, 1, -7, 6]


def test_with_zero_at_an_end_the_half_beyond_it_is_the_last_level() -> None:
    grid = DenormalInteger(4, zero=True)
    params = {"scale": torch.ones(1), "zero": torch.zeros(1)}
    assert grid.decode(grid.encode(torch.tensor([-5.0, -0.3, 13.4]), params), params).tolist() == [-0.5, -0.5, 13.0]


def test_fewer_small_weights_are_lost_and_heavy_tails_gain() -> None:
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(64, 128, generator=generator) * torch.randn(64, 128, generator=generator).mul(0.7).exp()
    with_halves, _ = decoded(parse_format("dint4-row-zero"), w)
    integers, _ = decoded(parse_format("int4-row-zero"), w)
    assert (with_halves == 0).sum() < 0.7 * (integers == 0).sum()
    assert (with_halves - w).square().mean() < (integers - w).square().mean()


def test_other_widths_are_refused() -> None:
    with pytest.raises(FormatError, match="3 to 8 bits"):
        DenormalInteger(2)
