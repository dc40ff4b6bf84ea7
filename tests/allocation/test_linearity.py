"""Factors are what noise shows, and a budget buys the best options that there are."""

import itertools

import pytest
import torch

from bitpress.allocation.linearity import NOISES, measured_factors, spend
from bitpress.errors import NumericsError, UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.higgs import HIGGS

FORMATS = ("gauss4x2-row", "gauss6x2-row", "gauss8x2-row")


def test_factors_are_those_of_a_loss_that_is_linear_in_the_errors() -> None:
    true = (3.0, 0.0, 0.25)
    rises = [[alpha * noise for noise in NOISES] for alpha in true]
    assert measured_factors(rises) == pytest.approx(true)
    # A third of a percent more at one noise of three is a ninth of a percent more altogether.
    rises[0][2] *= 1.003
    assert measured_factors(rises)[0] == pytest.approx(3.003)
    assert measured_factors([[-1e-6, 1e-7, -1e-7]]) == (0.0,)


def test_factors_of_a_small_network_are_found_by_noise() -> None:
    """Two linear layers and a squared loss: the rise of noise in a layer is known in closed form, the energy of what the rest passes on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=generator)
    first, second = torch.randn(16, 12, generator=generator), torch.randn(8, 16, generator=generator) * 0.3
    y = x @ first.T @ second.T

    def rise(layer: int, noise: float) -> float:
        weights = [first, second]
        w = weights[layer]
        weights[layer] = w + (noise * w.square().mean()).sqrt() * torch.randn(w.shape, generator=generator)
        return float((x @ weights[0].T @ weights[1].T - y).square().sum(1).mean())

    rises = [[sum(rise(layer, noise) for _ in range(40)) / 40 for noise in NOISES] for layer in range(2)]
    got = measured_factors(rises)
    expected = (
        float(first.square().mean() * x.square().sum(1).mean() * second.square().sum()),
        float(second.square().mean() * len(y.T) * (x @ first.T).square().sum(1).mean()),
    )
    # The mean of 120 draws, each of some hundred weights.
    assert got == pytest.approx(expected, rel=0.1)


def layers() -> tuple[list[list[float]], list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(16, 64), (32, 64), (16, 128), (48, 64)]
    weights = [torch.randn(*shape, generator=generator) for shape in shapes]
    formats = [parse_format(name) for name in FORMATS]
    errors = [[HIGGS().quantize(w, None, fmt).figures["relative_error"] for fmt in formats] for w in weights]
    return errors, [[fmt.nbytes(shape) for fmt in formats] for shape in shapes], [w.numel() for w in weights]


@pytest.mark.parametrize("bits", [2.6, 2.8, 3.3, 4.1])
def test_a_budget_buys_the_best_of_all_choices_within_it(bits: float) -> None:
    errors, sizes, weights = layers()
    factors = (5.0, 0.1, 1.0, 0.7)
    chosen = spend(factors, errors, sizes, weights, bits)

    def cost(options: tuple[int, ...]) -> tuple[float, int]:
        rise = sum(a * e[o] for a, e, o in zip(factors, errors, options, strict=True))
        return rise, sum(s[o] for s, o in zip(sizes, options, strict=True))

    within = [o for o in itertools.product(range(3), repeat=4) if 8 * cost(o)[1] <= bits * sum(weights)]
    assert 8 * cost(chosen)[1] <= bits * sum(weights)
    assert cost(chosen)[0] == pytest.approx(min(cost(o)[0] for o in within))
    assert bits > 4 or len(set(chosen)) > 1


def test_what_cannot_be_is_said() -> None:
    errors, sizes, weights = layers()
    with pytest.raises(UsageError, match=r"2 bits a weight cannot be met: the smallest formats take 2\.\d+"):
        spend((1.0,) * 4, errors, sizes, weights, 2.0)
    for bits in (0.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must be above 0"):
            spend((1.0,) * 4, errors, sizes, weights, bits)
    with pytest.raises(UsageError, match="for every layer"):
        spend((1.0,), errors, sizes, weights, 3.0)
    with pytest.raises(UsageError, match="for each noise"):
        measured_factors([[1.0]])
    with pytest.raises(NumericsError, match="infinite"):
        measured_factors([[1.0, 2.0, float("inf")]])
