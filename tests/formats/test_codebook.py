"""Codebooks and Gaussian grids: what the laws cannot know, their quality and the numbers that are published."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from bitpress.errors import FormatError, UsageError
from bitpress.formats import parse_format
from bitpress.formats.grids.additive_book import AdditiveBook, beam_search
from bitpress.formats.grids.clusters import _means, cluster, spread_sample
from bitpress.formats.grids.codebook import FixedBook, LearnedBook
from bitpress.formats.grids.gaussian import gaussian_levels, gaussian_points
from bitpress.formats.grids.nearest import nearest

NORMAL = NormalDist()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(name: str, w: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """The squared error relative to the weight's own square, both weighted alike."""
    fmt = parse_format(name)
    params = fmt.fit(w, importance)
    weights = torch.ones_like(w) if importance is None else importance
    wrong = (fmt.decode(fmt.encode(w, params), params) - w).square() * weights
    return float(wrong.sum() / (w.square() * weights).sum())


def intervals(bits: int) -> list[tuple[float, float, float]]:
    """Level, probability and mean of what is nearest to it, exactly."""
    levels = gaussian_levels(bits)
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    found = []
    for level, (low, high) in zip(levels, pairwise(edges), strict=True):
        # On the right half from the other tail, where probabilities keep their digits.
        mass = NORMAL.cdf(high) - NORMAL.cdf(low) if high <= 0 else NORMAL.cdf(-low) - NORMAL.cdf(-high)
        found.append((level, mass, (NORMAL.pdf(low) - NORMAL.pdf(high)) / mass))
    return found


def levels_error(bits: int) -> float:
    """The exact mean squared error of the levels."""
    return 1 - sum(mass * level * (2 * mean - level) for level, mass, mean in intervals(bits))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_gaussian_level_is_the_mean_of_what_is_nearest(bits: int) -> None:
    assert len(gaussian_levels(bits)) == 1 << bits
    for level, _, mean in intervals(bits):
        assert level == pytest.approx(mean, abs=1e-6)


# The figures of Max 1960, "Quantizing for Minimum Distortion"; the last ones are a little below the exact ones.
@pytest.mark.parametrize(("bits", "published"), [(2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_gaussian_levels_have_the_published_error(bits: int, published: float) -> None:
    assert levels_error(bits) == pytest.approx(published, rel=3e-3)


def test_gaussian_levels_of_a_row_have_that_error() -> None:
    assert error("gauss4-row", normal(8, 8192)) == pytest.approx(0.0095, rel=0.03)


def plane_error(points: torch.Tensor) -> float:
    """The mean squared error a number, summed over a lattice of weighted points."""
    axis = torch.arange(-6 + 1 / 48, 6, 1 / 24)
    at = torch.cartesian_prod(axis, axis)
    weight = torch.exp(at.square().sum(-1).double() / -2)
    return float(((at - points[nearest(at, points)]).square().sum(-1) * weight).sum() / weight.sum() / 2)


# The error, on the same lattice, of the points that HIGGS publishes (transformers 5, `get_higgs_grid(2, n)`).
@pytest.mark.parametrize(("bits", "published"), [(4, 0.107597), (6, 0.029607), (8, 0.007748)])
def test_points_of_the_plane_beat_levels_and_the_published_points(bits: int, published: float) -> None:
    ours = plane_error(torch.tensor(gaussian_points(bits)))
    assert ours < 0.92 * levels_error(bits // 2)
    assert ours <= published * (1 + 1e-4)  # 16 points: the same ones turned, as exactly as this lattice can tell
    w = normal(8, 8192, seed=1)
    assert error(f"gauss{bits}x2-row", w) == pytest.approx(ours, rel=0.03)


def test_points_of_four_dimensions_beat_those_of_the_plane() -> None:
    points = torch.tensor(gaussian_points(8, 4))
    assert points.shape == (256, 4)
    at = torch.special.ndtri(
        torch.quasirandom.SobolEngine(4, scramble=True, seed=9).draw(1 << 19).double().clamp(1e-9, 1 - 1e-9)
    )
    code = nearest(at.float(), points)
    found = float((at - points[code]).square().mean())
    # Printed by scripts/build_gaussian_grids.py; pairs of 2 bits leave 0.1076, and no code less than 0.0625.
    assert found == pytest.approx(0.09622, rel=2e-3)
    # Lloyd's condition: a point is the mean of what is nearest to it, up to the sample of some 2,000 numbers each.
    mass = torch.bincount(code, minlength=256)[:, None]
    means = torch.zeros(256, 4, dtype=torch.float64).index_add_(0, code, at) / mass
    assert float((means - points).square().mean()) < 2e-4
    assert error("gauss8x4-row", normal(8, 8192, seed=1)) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("count", [1, 2, 33, 100, 1025, 5000])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_nearest_is_the_nearest(count: int, n: int) -> None:
    vectors, words = normal(n, 3, seed=count), normal(count, 3, seed=n + 1)
    distance = torch.cdist(vectors.double(), words.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest(vectors, words)
    assert found.shape == (n,)
    if n:
        # Squares of this size leave 1e-6 to the rounding of float32.
        assert torch.all(distance.gather(1, found[:, None])[:, 0].square() <= distance.amin(1).square() + 1e-5)


def test_clusters_find_groups_and_need_no_random_state() -> None:
    centers = normal(10, 4, seed=2) * 100
    vectors = (centers[:, None] + normal(10, 100, 4, seed=3)).reshape(-1, 4)
    weights = torch.ones(len(vectors), 1)
    state = torch.random.get_rng_state()
    words = cluster(vectors, weights, 10, 12)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(words, cluster(vectors, weights, 10, 12))
    means = vectors.view(10, 100, 4).mean(1)
    assert torch.cdist(means, words, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-3


def test_a_cluster_left_empty_takes_the_vector_with_the_largest_error() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    words = torch.tensor([[1.0, 0.0], [500.0, 0.0]])
    moved = _means(vectors, torch.ones(3, 1), nearest(vectors, words), words)
    assert torch.allclose(moved, torch.tensor([[10 / 3, 0.0], [9.0, 0.0]]))


@pytest.mark.parametrize(("n", "most"), [(1, 5), (2, 2), (1920, 10), (610, 610), (1000, 1 << 15)])
def test_a_spread_sample_takes_nothing_twice(n: int, most: int) -> None:
    sample = spread_sample(n, most)
    assert len(sample.unique()) == len(sample) == min(n, most)
    assert sample.min() >= 0
    assert sample.max() < n


def test_a_sample_is_spread_over_the_columns() -> None:
    # Rows of 192 vectors, a tenth of them: a fixed step of 192 or 10 would see few of the columns.
    columns = torch.bincount(spread_sample(100 * 192, 1920) % 192, minlength=192)
    assert columns.min() >= 5
    assert columns.max() <= 15


def test_learned_books_beat_levels_at_equal_bits() -> None:
    w = normal(128, 512, seed=4)
    assert error("vq4x2-row", w) < 0.1105  # the best 16 points have 0.1077, the best 4 levels 0.1175
    assert error("vq8x4-row", w) < 0.1065
    # Where weights of a pair are alike, a book knows and levels cannot.
    w[:, 1::2] = w[:, ::2] + 0.05 * normal(128, 256, seed=5)
    assert error("vq4x2-row", w) < 0.2 * error("gauss2-row", w)


def test_rows_of_any_size_share_a_book() -> None:
    w = normal(16, 512, seed=6) * torch.logspace(-3, 3, 16)[:, None]
    fmt = parse_format("vq8x4-row")
    params = fmt.fit(w)
    wrong = (fmt.decode(fmt.encode(w, params), params) - w).square().sum(-1) / w.square().sum(-1)
    assert wrong.max() < 0.2


@pytest.mark.parametrize("name", ["vq6x2-row", "aq2x4x4-row"])
def test_importance_moves_the_words(name: str) -> None:
    # The important columns have a distribution of their own, of which few other vectors tell.
    w = normal(32, 512, seed=7)
    w[:, :32] = w[:, :32].abs().pow(1.5)
    importance = torch.where(torch.arange(512) < 32, 1.0, 1e-3).expand_as(w)
    fmt = parse_format(name)
    wrong = {}
    for kind, params in (("plain", fmt.fit(w)), ("weighted", fmt.fit(w, importance))):
        wrong[kind] = ((fmt.decode(fmt.encode(w, params), params) - w).square() * importance).sum()
    assert wrong["weighted"] < 0.8 * wrong["plain"]


@pytest.mark.parametrize("books", [2, 3])
def test_words_are_solved_for_exactly(books: int) -> None:
    grid = AdditiveBook(books, 3, 4)
    weights = normal(600, 4, seed=9).square()
    codes = torch.randint(0, 8, (books, 600), generator=torch.Generator().manual_seed(10))
    truth = normal(books, 8, 4, seed=11)
    vectors = sum((truth[i][codes[i]] for i in range(books)), start=torch.zeros(600, 4))
    words = grid._solved(vectors, weights, codes, torch.zeros(books, 8, 4))
    left = vectors - sum(words[i][codes[i]] for i in range(books))
    # The ridge leaves a thousandth.
    assert left.abs().max() < 2e-2
    assert not torch.allclose(words, truth, atol=0.1)  # books may trade a constant


def test_additive_books_learn_more_than_what_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(32, 512, seed=12)
    learned = error("aq2x5x4-row", w)
    monkeypatch.setattr("bitpress.formats.grids.additive_book.ROUNDS", 0)
    assert learned < 0.97 * error("aq2x5x4-row", w)


def test_a_beam_comes_near_the_nearest_sum() -> None:
    vectors, words = normal(500, 4, seed=13), normal(3, 16, 4, seed=14)
    grid = AdditiveBook(3, 4, 4)
    sums = grid._sums(words)
    nearest_error = (vectors - sums[nearest(vectors, sums)]).square().sum(-1)
    for width, slack in ((8, 1.5), (256, 1.0001)):
        codes = beam_search(vectors, words, width)
        beam_error = (vectors - sum(words[i][codes[i]] for i in range(3))).square().sum(-1)
        assert torch.all(beam_error >= nearest_error - 1e-5)
        assert beam_error.mean() <= slack * nearest_error.mean() + 1e-6


def test_sums_are_listed_in_the_order_of_their_codes() -> None:
    grid = AdditiveBook(3, 2, 2)
    words = normal(3, 4, 2, seed=15)
    codes = torch.arange(64, dtype=torch.uint8)[None]
    listed = grid.decode(codes, {"words": words, "scale": torch.ones(1, 1)})
    assert torch.equal(listed.view(64, 2), grid._sums(words))


def test_small_weights_are_not_lost_in_their_squares() -> None:
    w = normal(4, 64, seed=16)
    for name in ("gauss4-row-fp32", "gauss8x2-row-fp32", "vq4x2-row-fp32", "aq2x3x2-row-fp32"):
        fmt = parse_format(name)
        large, small = fmt.fit(w), fmt.fit(w * 1e-25)
        assert torch.allclose(small["scale"] * 1e25, large["scale"])
        values = fmt.decode(fmt.encode(w * 1e-25, small), small) * 1e25
        # A word may be rounded to the next float16.
        assert torch.allclose(values, fmt.decode(fmt.encode(w, large), large), rtol=2e-3, atol=2e-3)


def test_a_book_of_three_words_refuses_a_fourth() -> None:
    book = FixedBook("three", ((1.0, 0.0), (0.0, 1.0), (-1.0, -1.0)))
    assert (book.code_bits, book.num_codes, book.span) == (2, 3, 2)
    book.check(torch.tensor([0, 2], dtype=torch.uint8))
    with pytest.raises(FormatError, match="a code is 3"):
        book.check(torch.tensor([3], dtype=torch.uint8))


@pytest.mark.parametrize("name", ["aq3x6x4-row", "aq16x2x4-row"])
def test_too_many_bits_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="at most 16 bits"):
        parse_format(name)


@pytest.mark.parametrize("name", ["vq17x4-row", "vq8x1-row", "vq08x4-row", "aq1x8x8-row", "aq2x9x8-row"])
def test_names_beyond_the_families_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        parse_format(name)


def test_any_learned_book_has_a_name() -> None:
    assert parse_format("vq11x7-row").grid == LearnedBook(11, 7)
    assert parse_format("aq4x4x16-row").grid == AdditiveBook(4, 4, 16)
