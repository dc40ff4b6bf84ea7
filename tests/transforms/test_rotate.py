"""The rotation itself: orthogonal in float64 at every width, the vector of ones where means are subtracted, another one for another seed."""

import pytest
import torch

from bitpress.errors import FormatError, UsageError
from bitpress.transforms.rotate import Rotate

# A power of two, one with Paley's matrix of order 36, one with the Hartley matrix of 43.
WIDTHS = (64, 576, 172)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("centred", [False, True])
def test_a_rotation_is_orthogonal_and_leaves_no_channel_apart(kind: str, width: int, centred: bool) -> None:
    rotation = Rotate(kind=kind).of_residual(width, centred=centred)  # type: ignore[arg-type]
    matrix = rotation.apply(torch.eye(width)).T
    assert matrix.dtype == torch.float64
    # Hartley's matrix is held in float32: entries below 2 / sqrt(width) are rounded by 2^-25 of that.
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-6
    # A channel alone is spread over all: entries of variance 1 / width, of which sqrt(40 / width) is beyond six deviations.
    assert matrix.abs().max() < (40 / width) ** 0.5
    ones = torch.ones(width, dtype=torch.float64)
    assert bool(((matrix @ ones - ones).abs() < 1e-5).all()) == centred


def test_the_seed_and_the_site_decide_the_rotation() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    first = Rotate().of_residual(64, centred=False).apply(x)
    assert torch.equal(first, Rotate().of_residual(64, centred=False).apply(x))
    assert not torch.equal(first, Rotate(seed=1).of_residual(64, centred=False).apply(x))
    assert not torch.equal(first, Rotate().of_values(64).apply(x))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UsageError, match="kind='random'"):
        Rotate(kind="random")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one of them is true"):
        Rotate(residual=False, values=False)
    with pytest.raises(UsageError, match="seed=-1"):
        Rotate(seed=-1)
    with pytest.raises(FormatError, match="core must be at most"):
        Rotate().of_residual(2 * 2053, centred=False)
