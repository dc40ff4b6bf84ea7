"""What each paper of learned maps says of its own: how the matrix is made, and which of its entries move."""

import pytest
import torch

from bitpress.errors import NumericsError, UsageError
from bitpress.formats import Affine, Kronecker, Packed, Scale, parse_format
from bitpress.formats.maps.rotations import LARGEST
from bitpress.tuning.affinequant import AffineQuant
from bitpress.tuning.cayley import CayleySGD, cayley, orders_of
from bitpress.tuning.flatquant import FlatQuant
from bitpress.tuning.learned import Start
from bitpress.tuning.learned_maps import SharedInput
from bitpress.tuning.omniquant import OmniQuant
from bitpress.tuning.ostquant import OSTQuant
from bitpress.tuning.spinquant import SpinQuant

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unmoved(n: int) -> torch.Tensor:
    return torch.eye(n)


def test_every_map_begins_as_the_identity() -> None:
    for tuning in (AffineQuant(), FlatQuant(), OSTQuant(), SpinQuant()):
        matrix = tuning.matrix(24, CPU)
        assert matrix is not None
        assert torch.equal(matrix.map(0.0).apply(draw(3, 24)), draw(3, 24))
    assert OmniQuant().matrix(24, CPU) is None


def test_affinequant_opens_its_bands_from_the_diagonal_on() -> None:
    """Of 5 channels the diagonal moves first, two bands on each side at a half, all at the end; beside the diagonal a tenth counts."""
    matrix = AffineQuant(stability=0.1).matrix(5, CPU)
    (leaf,) = matrix.leaves()
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    for progress, bands in ((0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)):
        change = matrix.map(progress)
        assert isinstance(change, Affine)
        (gradient,) = torch.autograd.grad(change.right.sum(), leaf.tensor)
        expected = torch.where(distance == 0, 1.0, torch.where(distance <= bands, 0.1, 0.0))
        torch.testing.assert_close(gradient, expected)
    wide = AffineQuant().matrix(LARGEST + 1, CPU)
    assert isinstance(wide.map(0.5), Scale)
    with pytest.raises(UsageError, match="stability=0"):
        AffineQuant(stability=0.0)


def test_a_matrix_without_inverse_ends_learning() -> None:
    shared = SharedInput(FlatQuant(), 6, None, CPU)
    assert shared.matrix is not None
    shared.matrix.leaves()[0].tensor.data.copy_(-torch.eye(2))
    with pytest.raises(NumericsError, match="affine map"):
        shared.hard_map()
    with pytest.raises(NumericsError, match="without an inverse"):
        shared.into(draw(4, 6), 1.0)


def test_orders_are_equal_or_whole_and_bounded() -> None:
    assert orders_of(24, whole=False) == (4, 6)
    assert orders_of(24, whole=True) == (1, 24)
    assert orders_of(1536, whole=True) == (32, 48)
    assert orders_of(1031, whole=False) is None  # a prime above what a map holds
    assert FlatQuant().matrix(1031, CPU) is None
    change = OSTQuant(whole=True).matrix(24, CPU)
    assert change is not None
    assert isinstance(change.map(0.0), Kronecker)
    assert change.map(0.0).tensors()["right"].shape == (24, 24)


def test_cayleys_map_is_a_rotation_that_is_first_the_skew_matrix() -> None:
    a = draw(7, 7)
    turned = cayley(a)
    torch.testing.assert_close(turned @ turned.T, unmoved(7), rtol=0, atol=1e-6)
    assert float(torch.linalg.det(turned)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(cayley(1e-4 * a), unmoved(7) + 2e-4 * (a - a.T), rtol=0, atol=1e-5)


def test_steps_on_the_manifold_find_the_nearest_rotation() -> None:
    """Minimize |X b - c|^2 over rotations, whose optimum a singular value decomposition gives; every step is orthogonal."""
    b, wanted = draw(6, 40, seed=1), cayley(draw(6, 6, seed=2))
    c = wanted @ b
    x = torch.eye(6, requires_grad=True)
    optimizer = CayleySGD([{"params": [x], "lr": 0.2}])
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 150)
        (x.grad,) = torch.autograd.grad((x @ b - c).square().sum(), x)
        optimizer.step()
        torch.testing.assert_close(x @ x.T, unmoved(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.detach(), wanted, rtol=0, atol=1e-2)


def test_a_step_without_gradient_stays() -> None:
    x = torch.eye(4, requires_grad=True)
    x.grad = torch.ones(4, 4)  # symmetric: no rotation makes the loss less
    CayleySGD([{"params": [x], "lr": 1.0}]).step()
    assert torch.equal(x.detach(), unmoved(4))


def test_clipping_of_weights_begins_nearly_open_for_every_row() -> None:
    fmt = parse_format("int4-row")
    w = draw(6, 24)
    codes = FlatQuant().begin_alone(Start.of(Packed.pack(fmt, fmt.encode(w, fmt.fit(w)), fmt.fit(w)), w))
    assert [leaf.tensor.numel() for leaf in codes.leaves()] == [16, 36, 24, 6, 6]  # two factors, channels, both ends of rows
    assert [leaf.rate for leaf in codes.leaves()] == [1, 1, 1, 10, 10]
    share = codes.values(0.0).detach().abs().amax(1) / w.abs().amax(1)
    torch.testing.assert_close(share, torch.full((6,), float(torch.tensor(4.0).sigmoid())), rtol=1e-4, atol=0)
