"""AWQ's scaling: its objective is the true one, and a plan is never worse than none."""

import pytest
import torch

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format, parse_format
from bitpress.transforms import TRANSFORMS, AWQScale
from bitpress.transforms.awq_scale import OutputError

TOKENS, IN = 96, 64


def inputs(spread: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(TOKENS, IN) * torch.exp(spread * torch.randn(IN))


def stats_of(x: torch.Tensor) -> Stats:
    return Stats(x.shape[0], x.T @ x / x.shape[0], x.abs().mean(0))


def siblings() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, IN), torch.randn(16, IN) * 0.3]


def true_error(weights: list[torch.Tensor], x: torch.Tensor, s: torch.Tensor, fmt: Format) -> float:
    """The mean squared change of the outputs, from the inputs themselves."""
    total = 0.0
    for w in weights:
        params = fmt.fit(w * s)
        rounded = fmt.decode(fmt.encode(w * s, params), params)
        total += float((((x / s) @ rounded.T - x @ w.T).double() ** 2).sum()) / x.shape[0]
    return total


FORMATS = ["int3-g32", "int4-g16-zero", "int4-row", "int4-8x32", "int4-tensor-fp32"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_plan_is_the_best_of_the_grid_by_the_true_output_error(name: str) -> None:
    fmt, weights, x = parse_format(name), siblings(), inputs(1.5)
    search = AWQScale(grid=10)
    s = search.plan(weights, stats_of(x), fmt)
    assert s.dtype == torch.float32
    assert s.shape == (IN,)
    assert (s > 0).all()
    candidates = []
    for i in range(10):
        c = stats_of(x).mean_abs.pow(i / 10).clamp(min=1e-4)
        candidates.append(true_error(weights, x, c / (c.max() * c.min()).sqrt(), fmt))
    # The gram is summed in float32 over 96 tokens: the two errors agree to about 96 * 2^-24 and the roundings of D, 1e-4 is ample;
    # so the chosen one may be off the best by twice that.
    assert true_error(weights, x, s, fmt) <= min(candidates) * (1 + 2e-4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_a_plan_is_never_worse_than_none(name: str, spread: float) -> None:
    fmt, weights, x = parse_format(name), siblings(), inputs(spread, seed=2)
    s = AWQScale().plan(weights, stats_of(x), fmt)
    assert true_error(weights, x, s, fmt) <= true_error(weights, x, torch.ones(IN), fmt) * (1 + 1e-4)


def test_a_few_large_inputs_are_worth_scaling() -> None:
    fmt, weights = parse_format("int3-g32"), siblings()
    x = inputs(0.0, seed=3)
    x[:, ::16] *= 30
    s = AWQScale().plan(weights, stats_of(x), fmt)
    # The columns behind the large inputs carry nearly all of the error; enlarging them only must at least halve it.
    assert true_error(weights, x, s, fmt) < 0.5 * true_error(weights, x, torch.ones(IN), fmt)
    assert s[::16].min() > s[torch.arange(IN) % 16 != 0].max()
    assert float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-5)


def test_channels_of_one_producer_share_the_factor_of_their_mean() -> None:
    fmt, weights = parse_format("int3-g32"), siblings()
    x = inputs(1.5, seed=4)
    channel_of = torch.arange(IN).square() % 23  # 12 channels of unlike numbers of inputs, and some that make none
    s = AWQScale().plan(weights, stats_of(x), fmt, channel_of)
    assert not torch.equal(s, torch.ones(IN))
    channels = channel_of.unique()
    mean = torch.stack([stats_of(x).mean_abs[channel_of == c].mean() for c in channels])
    for c in channels:
        assert s[channel_of == c].unique().numel() == 1
    shared = torch.stack([s[channel_of == c][0] for c in channels])
    # log s is alpha * log mean less a constant, with alpha a multiple of 1/20.
    alpha = (shared / shared[0]).log()[1:] / (mean / mean[0]).log()[1:]
    torch.testing.assert_close(alpha, alpha[0].expand(len(alpha)), rtol=1e-3, atol=1e-3)
    assert float(alpha[0] * 20) == pytest.approx(round(float(alpha[0] * 20)), abs=1e-2)


def test_own_channels_and_no_mapping_are_the_same() -> None:
    fmt, weights, stats = parse_format("int3-g32"), siblings(), stats_of(inputs(1.0, seed=5))
    assert torch.equal(AWQScale().plan(weights, stats, fmt), AWQScale().plan(weights, stats, fmt, torch.arange(IN)))


def test_inputs_that_are_always_zero_get_a_positive_finite_factor() -> None:
    x = inputs(1.5, seed=6)
    x[:, 5] = 0
    s = AWQScale().plan(siblings(), stats_of(x), parse_format("int3-g32"))
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    assert not torch.equal(s, torch.ones(IN))


def test_what_is_missing_is_said() -> None:
    fmt, x = parse_format("int4-g32"), inputs(1.0)
    whole = stats_of(x)
    for stats in (
        Stats(0),
        Stats(TOKENS, gram=whole.gram),
        Stats(TOKENS, mean_abs=whole.mean_abs),
        Stats(0, whole.gram, whole.mean_abs),
    ):
        with pytest.raises(CalibrationError, match="gram and mean_abs"):
            AWQScale().plan(siblings(), stats, fmt)
    with pytest.raises(UsageError, match="at least one weight"):
        AWQScale().plan([], whole, fmt)
    with pytest.raises(UsageError, match="grid=0"):
        AWQScale(grid=0)


def test_the_table_names_every_search() -> None:
    assert TRANSFORMS["awq-scale"] is AWQScale
    assert AWQScale.needs == {"gram", "mean_abs"}


def test_products_on_tiles_give_the_error_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, x = parse_format("int3-g32"), inputs(1.5)
    gram = stats_of(x).need_gram("test")
    factor = torch.exp(torch.randn(IN))
    given = OutputError(siblings(), gram, fmt).of(factor)
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    # Differences of 3 thousand weights in bf16 are each off by 2^-9 at most, at random.
    assert given == pytest.approx(OutputError(siblings(), gram, fmt).of(factor), rel=2e-4)
