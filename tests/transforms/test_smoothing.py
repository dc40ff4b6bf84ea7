"""Smoothing: every family is its formula, a searched strength the best of its grid with both sides rounded."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format, parse_format
from bitpress.transforms.aqas import AQAS
from bitpress.transforms.dgq_smooth import DGQSmooth
from bitpress.transforms.equalize import Equalize
from bitpress.transforms.fptq_smooth import FPTQSmooth
from bitpress.transforms.llm_fp4_scale import LLMFP4Scale
from bitpress.transforms.qqq_smooth import QQQSmooth
from bitpress.transforms.smoothing import ProductError

TOKENS, IN = 96, 64
ROWS = [AQAS, QQQSmooth, DGQSmooth, FPTQSmooth, LLMFP4Scale]
WEIGHTS, INPUTS = parse_format("int4-g32"), parse_format("int4-row")


def outliers() -> torch.Tensor:
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40]] *= 50
    return x


def stats_of(x: torch.Tensor) -> Stats:
    return Stats(len(x), max_abs=x.abs().amax(0), sample=x)


def siblings() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, IN, generator=generator), torch.randn(16, IN, generator=generator) * 0.3]


def rounded(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    params = fmt.fit(x)
    return fmt.decode(fmt.encode(x, params), params)


def true_error(weights: Sequence[torch.Tensor], x: torch.Tensor, s: torch.Tensor) -> float:
    products = [(rounded(x / s, INPUTS) @ rounded(w * s, WEIGHTS).T - x @ w.T).double() for w in weights]
    return sum(float((p**2).sum()) for p in products) / len(x)


def test_the_logarithm_and_the_percentile_are_the_formulas() -> None:
    x, weights = outliers(), siblings()
    largest = x.abs().amax(0).double()
    torch.testing.assert_close(
        FPTQSmooth().plan(weights, stats_of(x), WEIGHTS).double(), largest / torch.log2(2 + largest), rtol=1e-6, atol=0
    )
    s = DGQSmooth(share=0.03).plan(weights, stats_of(x), WEIGHTS).double()
    limit = largest.sort().values[-int(IN * 0.03 + 1.5)]
    torch.testing.assert_close(s, torch.where(largest > limit, largest / limit, 1.0), rtol=1e-6, atol=0)
    assert (s > 1).sum() == 2
    # By default the count is 0.005 * 64 + 1.5, so the largest channel is the limit itself.
    assert torch.equal(DGQSmooth().plan(weights, stats_of(x), WEIGHTS), torch.ones(IN))


def test_powers_of_two_are_the_nearest_to_the_channels() -> None:
    x, weights = outliers() * torch.logspace(-3, 2, IN), siblings()
    s = LLMFP4Scale(octaves=5).plan(weights, stats_of(x), WEIGHTS)
    relative = x.abs().amax(0) / x.abs().max()
    assert torch.equal(s, 2.0 ** relative.log2().round().clamp(min=-5))
    assert s.max() == 1
    assert s.min() == 2.0**-5
    assert len(s.unique()) > 3


def test_a_searched_strength_is_the_best_of_the_grid() -> None:
    x, weights = outliers(), siblings()
    largest, columns = x.abs().amax(0).double(), torch.cat(weights).abs().amax(0).double()
    powers = [largest ** (i / 10) / columns ** (1 - i / 10) for i in range(11)]
    limits = [(largest / (largest.max() * (1 - 0.9 * i / 9))).clamp(min=1) for i in range(10)]
    for search, grid in ((AQAS(grid=10), powers), (QQQSmooth(grid=10, smallest=0.1), limits)):
        s = search.plan(weights, stats_of(x), WEIGHTS, None, INPUTS)
        tried = [true_error(weights, x, f.float()) for f in grid]
        chosen = grid[tried.index(min(tried))]
        torch.testing.assert_close(s.double() / s[0], chosen / chosen[0], rtol=1e-5, atol=0)
        assert true_error(weights, x, s) < 0.5 * true_error(weights, x, torch.ones(IN))


def test_the_error_is_that_of_both_roundings_or_of_weights_alone() -> None:
    x, weights, s = outliers(), siblings(), torch.rand(IN, generator=torch.Generator().manual_seed(2)) + 0.5
    both = ProductError(weights, x, WEIGHTS, INPUTS).of(s)
    assert both == pytest.approx(true_error(weights, x, s), rel=1e-5)
    alone = ProductError(weights, x, WEIGHTS, None).of(s)
    assert alone < 0.6 * both


@pytest.mark.parametrize("row", ROWS)
def test_inputs_of_one_channel_share_a_factor_and_empty_channels_have_one(row: type[Any]) -> None:
    x, weights = outliers(), siblings()
    x[:, 5] = 0
    for w in weights:
        w[:, 9] = 0
    s = row().plan(weights, stats_of(x), WEIGHTS, torch.arange(IN) // 4, INPUTS)
    assert torch.equal(s, s.reshape(-1, 4)[:, :1].expand(-1, 4).reshape(-1))
    for some in (x, torch.zeros(TOKENS, IN)):
        s = row().plan(weights, stats_of(some), WEIGHTS, None, INPUTS)
        assert torch.isfinite(s).all()
        assert (s > 0).all()


@pytest.mark.parametrize("row", ROWS)
def test_what_is_missing_is_said(row: type[Any]) -> None:
    whole = stats_of(outliers())
    with pytest.raises(UsageError, match="at least one weight"):
        row().plan([], whole, WEIGHTS)
    for stats in (Stats(TOKENS), Stats(0, max_abs=whole.max_abs)):
        with pytest.raises(CalibrationError, match="max_abs is needed"):
            row().plan(siblings(), stats, WEIGHTS)
    if "sample" in row.needs:
        with pytest.raises(CalibrationError, match="sample is needed"):
            row().plan(siblings(), Stats(TOKENS, max_abs=whole.max_abs), WEIGHTS)


@pytest.mark.parametrize(
    ("row", "settings"),
    [(AQAS, {"grid": 0}), (QQQSmooth, {"grid": 1}), (QQQSmooth, {"smallest": 1.0}), (DGQSmooth, {"share": 1.0})],
)
def test_settings_out_of_range_are_refused(row: type[Any], settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(settings)))):
        row(**settings)


def test_equalization_makes_the_ranges_of_two_matrices_alike() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(IN, 20, generator=generator), torch.randn(24, IN, generator=generator)
    first *= torch.logspace(-2, 2, IN)[:, None]
    s = Equalize().plan([second], Stats(1), WEIGHTS, None, None, first.abs().amax(1))
    before, after = (first / s[:, None]).abs().amax(1), (second * s).abs().amax(0)
    ratio = before / after
    torch.testing.assert_close(ratio, ratio.mean().expand(IN), rtol=1e-5, atol=0)
    assert torch.equal(Equalize().plan([second], Stats(1), WEIGHTS), torch.ones(IN))
