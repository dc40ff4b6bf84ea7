"""PVQ: pulses, feedback and lengths against their formulas."""

import itertools

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import Packed, parse_format
from bitpress.formats.grids.pyramid import Pyramid
from bitpress.quantizers.mechanisms.row_scales import solve_scales
from bitpress.quantizers.pvq import PVQ, move_pulses
from bitpress.quantizers.quantizer import output_error

DAMP = 0.01


def case(seed: int, out: int = 6, inner: int = 24) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inner, generator=generator) @ torch.randn(inner, inner, generator=generator)
    return torch.randn(out, inner, generator=generator), Stats(300, x.T @ x / 300)


def damped(stats: Stats) -> torch.Tensor:
    gram = stats.need_gram("test").double()
    return gram + DAMP * gram.diagonal().mean() * torch.eye(len(gram))


def pyramid(n: int, k: int) -> torch.Tensor:
    return torch.tensor([p for p in itertools.product(range(-k, k + 1), repeat=n) if sum(map(abs, p)) == k])


def cost(target: torch.Tensor, points: torch.Tensor, metric: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The cost of every point for one vector, written out."""
    unit = points / points.float().norm(dim=-1, keepdim=True)
    length = (unit @ metric @ target) / (unit @ metric * unit).sum(-1) if scale is None else torch.full((len(points),), scale)
    difference = target - length.clamp(min=0)[:, None] * unit
    squared: torch.Tensor = (difference @ metric * difference).sum(-1)
    return squared


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize(("n", "k"), [(3, 4), (4, 3)])
def test_no_single_move_is_left_that_lowers_the_cost(n: int, k: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(n)
    mix = torch.randn(n, n, generator=generator)
    metric = mix @ mix.T + 0.1 * torch.eye(n)
    target = torch.randn(40, n, generator=generator)
    grid = Pyramid(n, k)
    start = grid.points(grid.encode(target, {}).flatten())
    scales = None if scale is None else torch.full((40, 1), scale)
    moved = move_pulses(target, start, metric, scales, 20)
    assert (moved.abs().sum(1) == k).all()
    assert not torch.equal(start, moved)
    points = pyramid(n, k)
    for row, p, before in zip(target, moved, start, strict=True):
        near = points[(points - p).abs().sum(1) <= 2]
        own = cost(row, p[None], metric, scale)[0]
        assert own <= cost(row, before[None], metric, scale)[0] + 1e-5
        assert own <= cost(row, near, metric, scale).min() + 1e-4


def test_no_moves_leave_the_nearest_direction() -> None:
    target = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    grid = Pyramid(4, 4)
    start = grid.points(grid.encode(target, {}).flatten())
    assert torch.equal(move_pulses(target, start, torch.eye(4), None, 0), start)
    # By the plain metric the nearest direction has no better neighbour.
    assert torch.equal(move_pulses(target, start, torch.eye(4), None, 9), start)


@pytest.mark.parametrize("seed", range(3))
def test_feedback_and_lengths_on_the_way_are_their_formulas(seed: int) -> None:
    w, stats = case(seed)
    gram, grid = damped(stats), Pyramid(4, 4)
    w_hat = w.clone()
    for start in range(0, w.shape[1], 4):
        rest = torch.linalg.inv(gram[start:, start:])
        target = w[:, start:].double() + (w - w_hat)[:, :start].double() @ gram[:start, start:] @ rest
        target, metric = target[:, :4].float(), torch.linalg.inv(rest[:4, :4]).float()
        unit = grid.decode(grid.encode(target, {}), {"scale": torch.ones(1)})
        length = (target @ metric * unit).sum(1) / (unit @ metric * unit).sum(1)
        w_hat[:, start : start + 4] = unit * length[:, None].clamp(min=0)
    fmt = parse_format("pvq4k4-g4-fp32")
    ours = PVQ(moves=0, lengths=False, order="natural").quantize(w, stats, fmt).weight.dequantize()
    assert torch.allclose(ours, w_hat, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", ["g4", "g8", "row"])
def test_lengths_are_the_least_squares_solution(block: str) -> None:
    w, stats = case(3)
    fmt = parse_format(f"pvq4k4-{block}-fp32")
    gram = damped(stats)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    solved = fmt.decode(codes, solve_scales(w, codes, params, gram.float(), fmt)).double()
    root = torch.linalg.cholesky(gram).T  # |root d'|^2 is the output error
    unit = fmt.decode(codes, {**params, "scale": torch.ones_like(params["scale"])}).double()
    across = params["scale"].shape[1]
    positive = 0
    for row in range(len(w)):
        columns = torch.block_diag(*unit[row].view(across, -1))
        best = torch.linalg.lstsq(root @ columns.T, root @ w[row].double()).solution
        if (best > 0).all():
            positive += 1
            assert torch.allclose(solved[row], best @ columns, rtol=1e-3, atol=1e-3)
    assert positive


def test_pulses_and_lengths_each_lower_the_error() -> None:
    w, stats = case(4, out=64, inner=96)
    fmt = parse_format("pvq8k5-g8")
    errors = [
        output_error(w, PVQ(moves=moves, lengths=lengths).quantize(w, stats, fmt).weight.dequantize(), stats)
        for moves, lengths in ((0, False), (4, False), (4, True))
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("fmt", ["pvq4k4-g4", "pvq8k5-g24", "pvq4k4-2x8", "pvq8k3-tensor"])
def test_rows_in_another_order_give_their_codes_in_that_order(fmt: str) -> None:
    w, stats = case(5, out=8)
    order = torch.tensor([4, 5, 2, 3, 0, 1, 6, 7])
    first, second = (PVQ().quantize(v, stats, parse_format(fmt)).weight.dequantize() for v in (w, w[order]))
    assert torch.allclose(first[order], second, atol=1e-5)


def test_a_weight_of_zeros_stays_zero() -> None:
    _, stats = case(6)
    weight = PVQ().quantize(torch.zeros(4, 24), stats, parse_format("pvq8k5-g8")).weight
    assert isinstance(weight.terms[0], Packed)
    assert not weight.dequantize().any()


def test_what_it_cannot_do_is_refused() -> None:
    w, stats = case(7)
    with pytest.raises(FormatError, match="pvq serves pvq"):
        PVQ().quantize(w, stats, parse_format("int2-row"))
    for settings in ({"moves": -1}, {"damp": 0.0}, {"order": "random"}):
        with pytest.raises(UsageError):
            PVQ(**settings)
