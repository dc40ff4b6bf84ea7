"""The picture of a weight against plain counts, and where floats end."""

import itertools
import math

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.pipeline.weight_picture import BINS, NAMED, REACH, draw_weight, look_at


def matrices(seed: int, rows: int = 64, columns: int = 48) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    x = torch.randn(200, columns, generator=generator)
    w[:, 5] *= 4
    x[:, 7] *= 30
    x[:, 9] *= 20
    return w, (w * 2).round() / 2, Stats(200, gram=x.T @ x / 200, mean_abs=x.abs().mean(0))


def test_against_plain_counts() -> None:
    w, w_hat, stats = matrices(0)
    found = draw_weight([look_at(w, w_hat, stats)])
    d, deviation = found.distribution, float(w.std(correction=0))
    assert d.deviation == pytest.approx(deviation, rel=1e-3)
    for values, counts in ((w, d.original), (w_hat, d.compressed)):
        edges = torch.linspace(-REACH, REACH, BINS + 1) * deviation
        expected = [int(((values >= a) & (values < b)).sum()) for a, b in itertools.pairwise(edges)]
        shares = torch.tensor(counts) / 10_000 * values.numel()
        assert (shares - torch.tensor(expected)).abs().max() <= 2, "a value on an edge may count on either side"
    assert d.outside == pytest.approx(float((w.abs() > REACH * deviation).double().mean()), rel=1e-3)
    assert d.largest == pytest.approx(float(w.abs().max()) / deviation, rel=1e-3)


def test_channels_are_ranked_by_their_inputs_and_share_the_error() -> None:
    w, w_hat, stats = matrices(1)
    channels = draw_weight([look_at(w, w_hat, stats)]).channels
    assert stats.gram is not None
    energies = stats.gram.diagonal()
    error = (w - w_hat).square().sum(0) * energies
    assert (channels.ranked_by, channels.of, len(channels.index)) == ("inputs", 48, NAMED)
    assert channels.index[:2] == [7, 9]
    assert channels.inputs is not None
    sizes = energies.sqrt()
    assert channels.inputs[0] == pytest.approx(float(sizes[7] / sizes.median()), rel=1e-3)
    assert channels.error[0] == pytest.approx(float(error[7] / error.sum()), rel=1e-3)


def test_without_inputs_the_weight_ranks() -> None:
    w, w_hat, _ = matrices(2)
    channels = draw_weight([look_at(w, w_hat, None)]).channels
    assert (channels.ranked_by, channels.inputs, channels.index[0]) == ("weights", None, 5)
    by_size = draw_weight([look_at(w, w_hat, Stats(1, mean_abs=torch.arange(48.0)))]).channels
    assert (by_size.ranked_by, by_size.index[0]) == ("inputs", 47)


def test_experts_are_summed_and_one_without_inputs_adds_no_error() -> None:
    w, w_hat, stats = matrices(3)
    alone = draw_weight([look_at(w, w_hat, stats)])
    same = draw_weight([look_at(w, w_hat, stats)] * 3)
    assert same == alone
    other = draw_weight([look_at(w, w_hat, stats), look_at(-w, torch.zeros_like(w), None)])
    assert other.channels.error == alone.channels.error
    assert other.distribution.original != alone.distribution.original


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20, 3e37])
def test_sizes_out_of_the_range_of_squares(size: float) -> None:
    w, w_hat, stats = matrices(4)
    found = draw_weight([look_at(w * size, w_hat * size, stats)])
    shown = found.model_dump()
    numbers = [*shown["distribution"]["original"], *shown["channels"]["error"], *shown["channels"]["inputs"]]
    assert all(map(math.isfinite, numbers))
    if size:
        usual = draw_weight([look_at(w, w_hat, stats)])
        assert found.channels.index == usual.channels.index
        assert found.distribution.largest == pytest.approx(usual.distribution.largest, rel=1e-3)
        assert found.distribution.deviation == pytest.approx(usual.distribution.deviation * size, rel=1e-3)


def test_a_large_matrix_is_sampled_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.pipeline import weight_picture

    w, w_hat, stats = matrices(5)
    monkeypatch.setattr(weight_picture, "SAMPLE", w.numel() // 4)
    sampled, every = look_at(w, w_hat, stats), look_at(w[::4], w_hat[::4], stats)
    assert torch.equal(sampled.original, every.original)
    assert not torch.equal(sampled.weights, every.weights), "channels are sums over all rows"
