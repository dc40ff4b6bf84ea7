"""The utilization of the quantization space: what is known in closed form, what a rotation and an outlier do to it."""

import math

import pytest
import torch

from bitpress.evaluation.utilization import SAMPLE, utilization
from bitpress.formats import Hadamard


def test_known_shapes_have_their_known_share() -> None:
    generator = torch.Generator().manual_seed(3)
    # The corners of a square: the ellipsoid of their moments is the disc of radius 2, in a box of edge 2.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert utilization(corners) == pytest.approx(math.sqrt(math.pi * 4) / 2)
    assert utilization(3.0 * corners) == pytest.approx(utilization(corners))
    even = 2 * torch.rand(SAMPLE, 4, generator=generator) - 1
    ball = math.pi**2 / 2  # the volume of the unit ball in 4 dimensions
    assert utilization(even) == pytest.approx(ball**0.25 * math.sqrt(6 / 3) / 2, rel=0.03)


def test_an_outlier_channel_leaves_little_and_a_rotation_gives_it_back() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SAMPLE, 64, generator=generator)
    plain, largest = utilization(x), float(x.abs().max())
    x[:, 7] *= 30
    alone = utilization(x)
    turned = utilization(Hadamard.random(64, 64, generator).apply(x))
    assert plain is not None
    assert alone is not None
    assert turned is not None
    assert 0.4 < plain < 0.6
    assert alone == pytest.approx(plain * 30 ** (1 / 64) * largest / float(x.abs().max()), rel=0.02)
    assert turned > 4 * alone


def test_there_is_a_figure_for_few_vectors_and_dead_channels_and_none_for_nothing() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    x[:, 3:9] = 0
    few = utilization(x)
    assert few is not None
    assert 0 < few < 2
    assert utilization(torch.zeros(4, 4)) is None
    assert utilization(torch.full((4, 4), float("nan"))) is None
    assert utilization(torch.empty(0, 4)) is None
