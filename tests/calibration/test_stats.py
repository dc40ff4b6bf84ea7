"""Statistics of a layer's input, against one product in float64."""

import pytest
import torch

from bitpress.calibration import STATISTICS, Stats, StatsCollector
from bitpress.calibration.stats import TILE
from bitpress.errors import CalibrationError, NumericsError


@pytest.mark.parametrize("features", [1, 7, TILE, TILE + 5, 2 * TILE + 1])
def test_gram_and_mean_match_float64(features: int) -> None:
    x = torch.randn(6, 11, features, generator=torch.Generator().manual_seed(features))
    collector = StatsCollector(STATISTICS, features)
    for batch in x:
        collector.add(batch, "here")
    stats = collector.finish()
    rows = x.reshape(-1, features).double()
    assert stats.tokens == 66
    assert stats.gram is not None
    assert stats.mean_abs is not None
    # 66 products a sum, each rounded once to float32 and added once: 2 * 66 * 2**-24 of the sum of magnitudes.
    bound = 2 * 66 * 2.0**-24 * (rows.abs().T @ rows.abs() / 66)
    assert ((stats.gram.double() - rows.T @ rows / 66).abs() <= bound).all()
    assert torch.equal(stats.gram, stats.gram.T)
    # Summed in float64, rounded once at the end.
    torch.testing.assert_close(stats.mean_abs.double(), rows.abs().mean(0), rtol=2.0**-23, atol=0)


def test_only_what_is_needed_is_collected() -> None:
    for needs in ({"gram"}, {"mean_abs"}, set()):
        collector = StatsCollector(needs, 4)
        collector.add(torch.ones(3, 4), "here")
        stats = collector.finish()
        assert ((stats.gram is not None), (stats.mean_abs is not None)) == ("gram" in needs, "mean_abs" in needs)
        assert stats.tokens == 3


def test_half_precision_input_is_summed_in_float32() -> None:
    collector = StatsCollector({"gram"}, 1)
    collector.add(torch.full((4000, 1), 200.0, dtype=torch.float16), "here")  # 1.6e8 is beyond float16
    assert collector.finish().need_gram("here").item() == 40000.0


@pytest.mark.parametrize("sick", [[torch.nan], [torch.inf], [torch.inf, -torch.inf]])
def test_sick_input_names_the_place(sick: list[float]) -> None:
    x = torch.ones(5, 3)
    x.view(-1)[: len(sick)] = torch.tensor(sick)
    with pytest.raises(NumericsError, match=r"layers\.3\.up"):
        StatsCollector({"gram"}, 3).add(x, "layers.3.up")


def test_large_but_finite_input_is_no_error() -> None:
    collector = StatsCollector({"mean_abs"}, 2)
    collector.add(torch.full((4, 2), 3e38), "here")  # the sum overflows, no value does
    assert collector.finish().tokens == 4


def test_rescaled_is_the_statistics_of_the_scaled_input() -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(50, 8, generator=generator), torch.tensor([2.0, -0.5, 4.0, 1.0, 0.25, -8.0, 1.0, 0.0])

    def collect(x: torch.Tensor) -> Stats:
        collector = StatsCollector(STATISTICS, 8)
        collector.add(x, "here")
        return collector.finish()

    scaled, direct = collect(x).rescaled(factor), collect(x * factor)  # powers of two: equal to the last bit
    torch.testing.assert_close(scaled.gram, direct.gram, rtol=0, atol=0)
    torch.testing.assert_close(scaled.mean_abs, direct.mean_abs, rtol=0, atol=0)
    assert scaled.tokens == 50


def test_statistics_that_are_not_there() -> None:
    for stats in (Stats(5), Stats(0, torch.zeros(2, 2))):
        with pytest.raises(CalibrationError, match=r"here: no calibration statistics"):
            stats.need_gram("here")
