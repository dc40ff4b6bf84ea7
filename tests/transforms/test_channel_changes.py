"""Shifts and copies of channels by their formulas."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import ActivationFormat, ChannelFormat, parse_format
from bitpress.transforms.disassemble import Disassemble
from bitpress.transforms.shift import Shift

IN = 64
ROW4 = ActivationFormat(parse_format("int4-row-fp32"))


def outliers() -> torch.Tensor:
    x = torch.randn(100, IN, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40]] = x[:, [3, 40]] * 8 + torch.tensor([30.0, -50.0])
    return x


def test_the_shift_is_the_middle_of_the_range_and_smoothing_behind_it_sees_distances() -> None:
    x = outliers()
    stats = Stats(100, max_abs=x.abs().amax(0), sample=x)
    z = Shift().plan(stats)
    torch.testing.assert_close(z, (x.amax(0) + x.amin(0)) / 2)
    moved = stats.shifted(z)
    torch.testing.assert_close(moved.max_abs, (x.amax(0) - x.amin(0)) / 2, rtol=1e-5, atol=1e-6)
    assert (ROW4.round(x - z) + z - x).square().sum() < 0.3 * (ROW4.round(x) - x).square().sum()
    with pytest.raises(CalibrationError, match="sample is needed"):
        Shift().plan(Stats(100))


def test_copies_are_those_of_the_best_limit() -> None:
    x, w = outliers(), torch.randn(16, IN, generator=torch.Generator().manual_seed(1))

    def round_(u: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        return ChannelFormat(ROW4, copies=copies).round(u)

    def error(copies: torch.Tensor) -> float:
        return float(((round_(x, copies) - x) @ w.T).square().sum())

    sizes, none = x.abs().amax(0), torch.ones(IN, dtype=torch.uint8)
    for share in (0.1, 0.5):
        copies = Disassemble(share=share, steps=40).plan(x, w, round_)
        assert int(copies.sum()) <= IN * (1 + share)
        assert (copies > 1).nonzero().flatten().tolist() == [3, 40]
        limits = [float(sizes.max()) * i / 200 for i in range(1, 201)]
        tried = [(sizes / limit).ceil().clamp(min=1).to(torch.uint8) for limit in limits]
        allowed = [t for t in tried if int(t.sum()) <= IN * (1 + share)]
        assert error(copies) <= 1.1 * min(map(error, allowed))
        assert error(copies) < 0.5 * error(none)


def test_even_channels_are_left_alone() -> None:
    x, w = torch.ones(10, IN), torch.ones(4, IN)
    for some in (x, torch.zeros(10, IN)):
        assert torch.equal(Disassemble().plan(some, w, lambda u, copies: u), torch.ones(IN, dtype=torch.uint8))
    with pytest.raises(CalibrationError, match="sample is needed"):
        Disassemble().plan(None, w, lambda u, copies: u)
    for settings in ({"share": 0.0}, {"steps": 0}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            Disassemble(**settings)  # type: ignore[arg-type]
