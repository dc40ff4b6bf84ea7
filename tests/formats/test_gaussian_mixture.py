"""Gaussian mixtures: the zero level, means that are known, and quality beside integers."""

import pytest
import torch

from bitpress.formats import parse_format
from bitpress.formats.grids.gaussian_mixture import RUNS, GaussianMixture


def normal(seed: int, rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["gmm2-g64", "gmm3-row", "gmm4-tensor"])
@pytest.mark.parametrize("middle", [0.0, 5.0])
def test_one_level_is_zero(name: str, middle: float) -> None:
    levels = parse_format(name).fit(normal(1, 8, 256) + middle)["levels"]
    assert bool(((levels == 0).sum(-1) == 1).all())
    assert bool((levels.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("cols", [RUNS, 40 * RUNS])
def test_means_that_are_known_are_found(cols: int) -> None:
    means = torch.tensor([-2.0, 0.0, 1.5, 4.0])
    which = torch.randint(0, 4, (3, cols), generator=torch.Generator().manual_seed(2))
    w = means[which] + 0.1 * normal(3, 3, cols)
    levels = GaussianMixture(2).fit(w)["levels"][:, 0]
    # Each mean is that of a quarter of the weights, with 0.1 / sqrt(cols / 4) of chance: four of these, and the runs' rounding.
    assert bool(((levels - means).abs() < 4 * 0.1 / (cols / 4) ** 0.5 + 0.01).all())


def test_importance_counts_like_that_many_weights() -> None:
    w = normal(4, 2, 40)
    twice = torch.ones(40)
    twice[:16] = 2.0
    repeated = GaussianMixture(3).fit(torch.cat([w, w[:, :16]], dim=-1))["levels"]
    torch.testing.assert_close(GaussianMixture(3).fit(w, twice)["levels"], repeated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("tails", "most"), [(False, 0.9), (True, 0.4)])
def test_rows_beat_4_bit_integers_with_the_best_clipping(tails: bool, most: float) -> None:
    w = normal(5, 32, 1024)
    w = w / (normal(6, 96, 1024).square().view(3, 32, 1024).mean(0)).sqrt() if tails else w
    errors = []
    for name, shrink in (("gmm4-row", (1.0,)), ("int4-row", (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))):
        fmt = parse_format(name)
        params = fmt.fit(w, None, shrink)
        errors.append(float((fmt.decode(fmt.encode(w, params), params) - w).square().sum()))
    assert errors[0] < most * errors[1]
