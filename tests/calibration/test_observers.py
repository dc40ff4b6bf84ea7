"""Observers choose ranges: known answers, and what holds of each."""

import math

import pytest
import torch

from bitpress.calibration.observers import (
    KEPT_TOKENS,
    OBSERVERS,
    ChannelPercentile,
    Entropy,
    MinMax,
    MovingAverage,
    OutputError,
    Percentile,
    Seen,
    SquaredError,
    static_format,
)
from bitpress.errors import CalibrationError, NumericsError
from bitpress.formats import parse_format

SYMMETRIC, SHIFTED, FLOAT = (parse_format(name) for name in ("int8-tensor", "int8-tensor-zero", "e4m3-tensor"))


def seen(*batches: torch.Tensor) -> Seen:
    found = Seen(product=lambda x: x)
    for batch in batches:
        found.add(batch)
    return found


def normal(outlier: float = 0.0) -> torch.Tensor:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    if outlier:
        x[3, 7] = outlier
    return x


def error(fmt: object, ends: tuple[float, float], x: torch.Tensor) -> float:
    return float((static_format(fmt, ends).round(x) - x).square().mean())  # type: ignore[arg-type]


def test_ranges_that_can_be_said_beforehand() -> None:
    batches = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 1.0]])]
    assert MinMax().choose(seen(*batches), SYMMETRIC) == (-3.0, 2.0)
    low, high = MovingAverage(0.5).choose(seen(*batches), SYMMETRIC)
    assert (low, high) == (-2.0, 1.5)
    values = torch.arange(-500.0, 501.0)[None]
    assert Percentile(80).choose(seen(values), SYMMETRIC) == pytest.approx((-400.0, 400.0), abs=1.0)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("fmt", [SYMMETRIC, SHIFTED, FLOAT], ids=lambda f: f.name)
def test_zero_stays_zero_and_no_range_is_beyond_what_was_seen(name: str, fmt: object) -> None:
    found = seen(normal().abs() + 1.0)  # 0 is far from all values
    low, high = OBSERVERS[name]().choose(found, fmt)  # type: ignore[arg-type]
    assert high <= found.range[1]
    made = static_format(fmt, (low, high))  # type: ignore[arg-type]
    assert float(made.round(torch.zeros(1, 4)).abs().max()) == 0.0


def test_the_squared_error_is_the_least_of_all_ranges_that_are_tried() -> None:
    fmt = parse_format("int4-tensor")
    x = normal(outlier=40.0)
    found = seen(x)
    assert found.sample()[0].numel() == x.numel()
    best = SquaredError().choose(found, fmt)
    assert error(fmt, best, x) < 0.7 * error(fmt, MinMax().choose(found, fmt), x)
    assert all(error(fmt, best, x) <= error(fmt, (-40.0 * k, 40.0 * k), x) * 1.2 for k in (0.05, 0.1, 0.2, 0.5))


def test_the_entropy_leaves_an_outlier_out_and_nothing_of_an_even_input() -> None:
    fmt = parse_format("int4-tensor")
    high = Entropy().choose(seen(normal(outlier=100.0)), fmt)[1]
    assert high < 50
    even = torch.linspace(-1, 1, 8192).reshape(64, 128)
    high = Entropy().choose(seen(even), fmt)[1]
    assert math.isclose(high, 1.0, rel_tol=0.05)


def test_a_channel_s_percentile_is_that_of_its_own_values() -> None:
    x = normal()
    x[:, 5] *= 50  # a channel of outliers is inside, a single outlier of another channel is not
    x[3, 7] = 1e4
    low, high = ChannelPercentile(90).choose(batches := seen(*x.split(KEPT_TOKENS)), SYMMETRIC)
    assert torch.equal(batches.whole(), x)
    assert high == pytest.approx(float(x[:, 5].quantile(0.95)))
    assert low == pytest.approx(float(x[:, 5].quantile(0.05)))
    assert Percentile(99).choose(batches, SYMMETRIC)[1] < high / 2
    with pytest.raises(ValueError, match="keep is 20"):
        ChannelPercentile(20)


@pytest.mark.parametrize("name", ["int4-tensor", "e2m1-g16-fp8"])
def test_the_output_error_is_that_of_the_product(name: str) -> None:
    fmt, x = parse_format(name), normal()
    x[:, 5] *= 50
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    w[:, 5] = 0.0  # nothing reads the channel of outliers
    found = Seen(product=lambda d: d @ w.T)
    for batch in x.split(KEPT_TOKENS):
        found.add(batch)

    def lost(ends: tuple[float, float]) -> float:
        return float(((static_format(fmt, ends).round(x) - x) @ w.T).square().mean())

    best, plain = OutputError().choose(found, fmt), SquaredError().choose(found, fmt)
    assert best[1] < 0.5 * found.range[1]
    assert lost(best) < lost(plain)
    assert lost(best) == min(lost((found.range[0] * k / 64, found.range[1] * k / 64)) for k in range(1, 65))


def test_the_squared_error_of_groups_is_that_of_whole_tokens() -> None:
    fmt, x = parse_format("e2m1-g16-fp8"), normal(outlier=1e5)
    found = seen(*x.split(KEPT_TOKENS))
    ends = SquaredError().choose(found, fmt)
    tried = [(found.range[0] * k / 64, found.range[1] * k / 64) for k in range(1, 65)]
    assert error(fmt, ends, x) == min(error(fmt, other, x) for other in tried)


def test_what_was_never_seen_and_what_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match="no calibration token reached this input"):
        MinMax().choose(Seen(), SYMMETRIC)
    with pytest.raises(CalibrationError, match="no calibration token reached this input"):
        ChannelPercentile().choose(Seen(), SYMMETRIC)
    with pytest.raises(NumericsError, match="NaN or an infinity"):
        seen(torch.tensor([[math.inf]]))


def test_rare_values_and_single_channels_are_seen_in_a_large_batch() -> None:
    rare = torch.randn(4096, 576, generator=torch.Generator().manual_seed(0))
    rare[torch.arange(4) * 1000, torch.arange(4) * 100] = 3000.0
    channel = torch.randn(256, 576, generator=torch.Generator().manual_seed(1))
    channel[:, 5] *= 50
    for x in (rare, channel):
        found = seen(x)
        values, counts = found.sample()
        assert values.numel() < x.numel()
        assert float(counts.sum()) == pytest.approx(x.numel())
        least = min(error(SYMMETRIC, (found.range[0] * k / 16, found.range[1] * k / 16), x) for k in range(1, 17))
        assert error(SYMMETRIC, SquaredError().choose(found, SYMMETRIC), x) <= 1.1 * least
    inside = float((channel.abs() <= max(map(abs, Percentile(99.9).choose(seen(channel), SYMMETRIC)))).float().mean())
    assert inside == pytest.approx(0.999, abs=5e-4)


def test_an_input_that_was_always_zero_gets_a_scale() -> None:
    made = static_format(SHIFTED, SquaredError().choose(seen(torch.zeros(4, 8)), SHIFTED))
    assert float(made.tensors["scale"]) > 0
