"""Statistics of a layer's input, against one product in float64."""

import dataclasses

import pytest
import torch

from bitpress.calibration import STATISTICS, Stats, StatsCollector, of_origin
from bitpress.calibration.stats import SAMPLE, TILE
from bitpress.errors import CalibrationError, NumericsError
from bitpress.formats import Chain, Permutation, Scale
from bitpress.formats.maps.rotations import Kronecker


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


def full(x: torch.Tensor, original: torch.Tensor, weights: torch.Tensor) -> Stats:
    """Every statistic of one input, the heads' and the loss's drawn."""
    generator = torch.Generator().manual_seed(7)
    collector = StatsCollector({"gram", "mean_abs", "sample"}, x.shape[1])
    collector.add(x, "here")
    collector.add_original(x, original)
    collector.add_weighted("attention_gram", x, weights)
    heads = torch.stack([x[:20].T @ x[:20], x[20:].T @ x[20:]])
    drawn = torch.rand(6, x.shape[1], generator=generator)
    return dataclasses.replace(collector.finish(), row_gram=torch.eye(3).expand(2, 3, 3), head_gram=heads, sensitivity=drawn)


def streams() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 8, generator=generator)
    return x, x + 0.1 * torch.randn(50, 8, generator=generator), torch.rand(50, generator=generator) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_and_weighted_grams(dtype: torch.dtype) -> None:
    x, original, weights = streams()
    x, original = x.to(dtype), original.to(dtype)
    stats = full(x, original, weights)
    rows, others = x.double(), original.double()
    # Products of bf16 inputs may be multiplied in bf16 again: a difference or a weighted row is rounded to 8 bits once more.
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    cross, weighted = (others - rows).T @ rows / 50, (rows * weights.double()[:, None]).T @ rows / 50
    torch.testing.assert_close(stats.need("cross", "test").double(), cross, rtol=0, atol=rtol * float(cross.abs().max()))
    torch.testing.assert_close(
        stats.need("attention_gram", "test").double(), weighted, rtol=0, atol=rtol * float(weighted.abs().max())
    )


def test_every_statistic_follows_a_scaling() -> None:
    x, original, weights = streams()
    factor = torch.tensor([2.0, 0.5, 4.0, 1.0, 0.25, 8.0, 1.0, 2.0])
    scaled, direct = full(x, original, weights).rescaled(factor), full(x * factor, original * factor, weights)
    for name in ("gram", "mean_abs", "cross", "attention_gram", "head_gram", "sample"):
        torch.testing.assert_close(getattr(scaled, name), getattr(direct, name), rtol=0, atol=0)
    # The weight is divided by what the input is multiplied with, so its gradient is multiplied.
    torch.testing.assert_close(scaled.sensitivity, direct.need("sensitivity", "test") * factor**2)
    assert torch.equal(scaled.need("row_gram", "test"), torch.eye(3).expand(2, 3, 3))


def test_every_statistic_follows_a_map_or_is_left_out() -> None:
    x, original, weights = streams()
    stats = full(x, original, weights)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    turn = Kronecker.random(8, torch.Generator().manual_seed(3))
    change = Chain((Permutation(order), turn, Scale(torch.arange(1.0, 9.0))))
    mapped = stats.mapped(change)
    direct = full(change.apply(x), change.apply(original), weights)
    for name in ("gram", "cross", "attention_gram", "head_gram", "sample"):
        torch.testing.assert_close(getattr(mapped, name), getattr(direct, name), rtol=1e-4, atol=1e-4)
    assert mapped.mean_abs is None
    assert mapped.sensitivity is None
    assert mapped.row_gram is not None
    moved = stats.mapped(Permutation(order))
    assert torch.equal(moved.need("sensitivity", "test"), stats.need("sensitivity", "test")[:, order])
    assert torch.equal(moved.need("mean_abs", "test"), stats.need("mean_abs", "test")[order])
    other_rows = stats.mapped(None, turn)
    assert (other_rows.row_gram, other_rows.head_gram, other_rows.sensitivity) == (None, None, None)
    assert other_rows.gram is stats.gram


@pytest.mark.parametrize("tokens", [100, SAMPLE, 5000])
def test_a_sample_is_of_tokens_from_everywhere_whatever_the_batches(tokens: int) -> None:
    x = torch.arange(float(tokens))[:, None].repeat(1, 3)
    made = []
    for batch in (7, 512):
        collector = StatsCollector({"sample"}, 3)
        for some in x.split(batch):
            collector.add(some, "here")
        made.append(collector.finish().need("sample", "here"))
    assert torch.equal(*made)
    drawn = made[0][:, 0]
    assert len(drawn) == tokens if tokens <= SAMPLE else 0.45 * SAMPLE < len(drawn) <= SAMPLE
    # Every tenth of the text has its share, and so has every place in windows of 64 tokens.
    share = len(drawn) / tokens
    for places in (drawn * 10 // tokens, drawn % 64 // 8):
        counts = torch.bincount(places.long())
        assert ((counts - tokens * share / len(counts)).abs() <= 0.35 * tokens * share / len(counts) + 1).all()


def test_a_table_says_where_statistics_come_from() -> None:
    assert of_origin(STATISTICS, "loss") == {"sensitivity", "loss_gram", "output_gram"}
    assert of_origin({"gram", "cross"}, "original") == {"cross"}
    assert {field.name for field in dataclasses.fields(Stats)} == {"tokens", "held_out", *STATISTICS}
