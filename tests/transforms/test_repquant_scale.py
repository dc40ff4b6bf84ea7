"""RepQuant: ranges by channel become one for all, the shift moves into norm and biases, and odd codes of probabilities into a factor."""

import math

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import parse_format
from bitpress.formats.grids.logarithmic import logarithmic
from bitpress.transforms.channel_ends import channel_ends, clipped_ends
from bitpress.transforms.repquant_scale import RepQuantScale
from bitpress.transforms.shift import Shift
from bitpress.transforms.shift_folds import layer_bias, norm_bias

IN, LEVELS = 24, 63
INT6 = parse_format("int6-tensor-zero")


def of_norm() -> torch.Tensor:
    """Channels whose ranges differ in width and in place, as behind a norm."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, IN, generator=generator) * torch.linspace(0.1, 8, IN) + torch.randn(IN, generator=generator) * 5


def error_of(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, steps: int) -> torch.Tensor:
    step = (high - low) / steps
    return (((x.clamp(low, high) - low) / step).round() * step + low - x).square().sum(0)


def test_one_scale_for_all_is_one_for_each_channel_before_it() -> None:
    """What the product sees of shifted and divided channels is what every channel's own scale and zero point give: the paper's equations,
    with the zero points as they are before they are rounded."""
    x = of_norm()
    stats = Stats(200, max_abs=x.abs().amax(0), sample=x)
    z = Shift(place="folded", ends="clipped").plan(stats, INT6)
    r = RepQuantScale().plan([torch.ones(4, IN)], stats.shifted(z), INT6, inputs=INT6)
    assert float(r.mean()) == pytest.approx(1)
    low, high = clipped_ends(x, INT6)
    scale = (high - low) / LEVELS
    torch.testing.assert_close(r, scale / scale.mean(), rtol=1e-4, atol=1e-6)
    target = scale.mean()
    y = (x - z) / r
    zero = LEVELS / 2  # of all channels alike: their ranges lie around 0
    codes = (y / target + zero).round().clamp(0, LEVELS)
    by_channel = ((x - low) / scale).round().clamp(0, LEVELS)
    assert int((codes != by_channel).sum()) <= 3  # values at an edge between two codes
    torch.testing.assert_close(
        (codes - zero) * target * r + z, by_channel * scale + low, rtol=0, atol=float(scale.max()) * 1.01
    )


def test_the_folded_shift_is_that_of_the_public_code() -> None:
    """The bias of the norm, and of a layer behind it, by the formulas of RepQ-ViT's test_quant.py, whose target is the mean zero point."""
    generator = torch.Generator().manual_seed(1)
    gain, bias, own, w = (torch.randn(*shape, generator=generator).double() for shape in ((IN,), (IN,), (5,), (5, IN)))
    scale, zero = torch.rand(IN, generator=generator).double() + 0.1, torch.randint(0, 63, (IN,), generator=generator).double()
    least, target, r = -zero * scale, -zero.mean() * scale.mean(), scale / scale.mean()
    b = least / r - target
    shift = r * b  # in units of the norm's outputs
    moved, taken = norm_bias(bias, shift)
    torch.testing.assert_close(moved / r, bias / r - b)
    torch.testing.assert_close(layer_bias(own, w, taken), own + (w * r) @ b)
    x = torch.randn(7, IN, generator=generator).double()
    before, after = (x * gain + bias) @ w.T + own, ((x * gain + moved) / r) @ (w * r).T + layer_bias(own, w, taken)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_ends_of_channels_are_moved_apart_from_each_other() -> None:
    x = torch.randn(200, IN, generator=torch.Generator().manual_seed(2))
    x[0, 3], x[1, 4] = 20.0, -20.0
    few = parse_format("int3-tensor-zero")
    low, high = clipped_ends(x, few)
    whole = channel_ends(x)
    assert bool((error_of(x, low, high, 7) <= error_of(x, *whole, 7) * (1 + 1e-5)).all())
    assert float(high[3]) < 0.9 * 20
    assert float(low[3]) > float(whole[0][3]) - 1e-6
    assert float(low[4]) > -0.9 * 20
    for moved, end in zip(clipped_ends(x + 7, few), (low, high), strict=True):
        torch.testing.assert_close(moved, end + 7, rtol=0, atol=1e-4)
    for fmt in (None, parse_format("e4m3-tensor")):
        assert all(torch.equal(a, b) for a, b in zip(clipped_ends(x, fmt), whole, strict=True))


def test_what_no_norm_makes_keeps_one_scale() -> None:
    x = of_norm()
    stats = Stats(200, sample=x)
    ones = RepQuantScale().plan([torch.ones(4, IN)], stats, INT6, inputs=INT6, producer=torch.ones(IN))
    assert torch.equal(ones, torch.ones(IN))
    with pytest.raises(CalibrationError, match="sample is needed"):
        RepQuantScale().plan([torch.ones(4, IN)], Stats(200), INT6)
    for settings in ({"place": "norm"}, {"ends": "learned"}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            Shift(**settings)  # type: ignore[arg-type]


def test_odd_codes_of_probabilities_are_powers_of_2_times_a_factor() -> None:
    """The second reparametrisation: 2^(-k/2) is a shift by ceil(k/2) bits, and for odd codes the square root of 2 goes into the scale."""
    levels = logarithmic(5, 2)
    for k, level in enumerate(levels[:15]):
        assert level == pytest.approx(2.0 ** -math.ceil(k / 2) * ((k % 2) * (math.sqrt(2) - 1) + 1), rel=1e-12)
    p = torch.softmax(torch.randn(64, 200, generator=torch.Generator().manual_seed(3)) * 3, -1)
    fmt = parse_format("sqrtlog5-tensor-fp32")
    mine = fmt.decode(fmt.encode(p, params := fmt.fit(torch.ones(1, 1))), params)
    # The quantizer of RepQ-ViT at a scale of 1: it rounds the logarithm, and keeps one value more before 0.
    codes = (-p.log2() * 2).round()
    theirs = torch.where(codes >= 15, torch.zeros(()), 2 ** (-codes / 2))
    assert float((mine - p).square().sum()) <= float((theirs - p).square().sum())
    assert float(((mine - theirs).abs() > 0).float().mean()) < 0.15
