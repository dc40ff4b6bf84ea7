"""HIGGS rounds to the nearest Gaussian point at the block's root mean square, and its bits are those of an exhaustive search."""

import itertools

import pytest
import torch

from bitpress.allocation.knapsack import choose_bits
from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import parse_format
from bitpress.formats.grids.gaussian import gaussian_levels, gaussian_points
from bitpress.quantizers.higgs import HIGGS
from bitpress.transforms.basis import into_basis, with_maps
from bitpress.transforms.hadamard import HadamardBasis


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("fmt", "span"), [("gauss3-g16", 1), ("gauss2-row", 1), ("gauss4x2-g16", 2), ("gauss6x2-row", 2)])
def test_every_weight_is_the_nearest_point(fmt: str, span: int) -> None:
    w = normal(5, 48)
    parsed = parse_format(fmt)
    bits = parsed.grid.code_bits
    points = torch.tensor(gaussian_levels(bits))[:, None] if span == 1 else torch.tensor(gaussian_points(bits))
    size = 48 if parsed.block.cols == "all" else int(parsed.block.cols)
    blocks = w.reshape(-1, size)
    scale = blocks.square().mean(1, keepdim=True).sqrt().half().float()
    vectors = (blocks / scale).reshape(-1, span)
    nearest = points[torch.cdist(vectors, points).argmin(1)].reshape(-1, size) * scale
    outcome = HIGGS().quantize(w, None, parsed)
    torch.testing.assert_close(outcome.weight.dequantize(), nearest.reshape(5, 48))
    assert outcome.figures["relative_error"] == pytest.approx(
        float((nearest.reshape(5, 48) - w).square().sum() / w.square().sum())
    )


def test_the_rotation_makes_outliers_bearable() -> None:
    w = normal(64, 512, seed=1) ** 3
    fmt = parse_format("gauss4-row")
    maps = HadamardBasis().plan(w, None, fmt)
    rotated = HIGGS().quantize(into_basis(w, maps), None, fmt)
    # What 16 levels of a normal distribution leave, to a tenth: Max 1960 gives 0.00950.
    assert rotated.figures["relative_error"] == pytest.approx(0.0095, rel=0.1)
    assert HIGGS().quantize(w, None, fmt).figures["relative_error"] > 3 * 0.0095
    back = with_maps(rotated.weight, maps).dequantize()
    assert float((back - w).square().sum() / w.square().sum()) == pytest.approx(rotated.figures["relative_error"], rel=1e-3)


def test_a_searched_scale_is_no_worse() -> None:
    w, fmt = normal(16, 64, seed=2) ** 3, parse_format("gauss2-g16")
    errors = [HIGGS(clip=clip).quantize(w, None, fmt).figures["relative_error"] for clip in ("minmax", "mse")]  # type: ignore[arg-type]
    assert errors[1] < errors[0]


def test_other_grids_are_refused() -> None:
    for fmt in ("int4-g16", "nf4-g16", "mxfp4"):
        with pytest.raises(FormatError, match="higgs serves"):
            HIGGS().quantize(normal(2, 32), None, parse_format(fmt))


def exhaustive(errors: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    totals = [
        sum(errors[i][o] for i, o in enumerate(options))
        for options in itertools.product(*(range(len(layer)) for layer in sizes))
        if sum(sizes[i][o] for i, o in enumerate(options)) <= budget
    ]
    return min(totals)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_an_exhaustive_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = [int(torch.randint(1, 5, (), generator=generator)) for _ in range(5)]
    sizes = [sorted(torch.randint(3, 40, (n,), generator=generator).tolist()) for n in options]
    errors = [torch.rand(n, generator=generator).tolist() for n in options]  # more bytes need not be better
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in (low, low + 1, (low + high) // 2, high, high + 100):
        chosen = choose_bits(errors, sizes, budget)
        assert sum(s[o] for s, o in zip(sizes, chosen, strict=True)) <= budget
        assert sum(e[o] for e, o in zip(errors, chosen, strict=True)) == pytest.approx(exhaustive(errors, sizes, budget))


def test_large_sizes_keep_the_budget_and_come_close() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(10**6, 10**7, (60,), generator=generator).tolist()
    factors = torch.rand(60, generator=generator).tolist()
    bits = (2, 3, 4, 5, 6)
    sizes = [[n * b // 8 + 17 * b for b in bits] for n in weights]
    errors = [[f * 4.0**-b for b in bits] for f in factors]
    budget = sum(n * 7 // 16 for n in weights)
    chosen = choose_bits(errors, sizes, budget)
    spent = sum(s[o] for s, o in zip(sizes, chosen, strict=True))
    finer = choose_bits(errors, sizes, budget, units=1 << 18)
    total, better = (sum(e[o] for e, o in zip(errors, c, strict=True)) for c in (chosen, finer))
    assert spent <= budget
    assert better <= total <= 1.002 * better
    uniform = sum(e[1] for e in errors)  # 3 bits everywhere
    assert total < 0.7 * uniform
    assert all(
        factors[i] >= factors[j] for i in range(60) for j in range(60) if weights[i] == weights[j] and chosen[i] > chosen[j]
    )


def test_bytes_that_buy_nothing_are_not_spent() -> None:
    assert choose_bits([[1.0, 1.0], [0.5, 0.2]], [[10, 20], [10, 20]], 100) == (0, 1)


def test_what_cannot_be_chosen_is_an_error() -> None:
    with pytest.raises(UsageError, match="take 30 bytes, more than the budget of 29"):
        choose_bits([[1.0], [1.0]], [[10], [20]], 29)
    with pytest.raises(NumericsError, match="not finite"):
        choose_bits([[float("nan")]], [[10]], 29)
    for errors, sizes in (([], []), ([[1.0]], [[1, 2]]), ([[]], [[]])):
        with pytest.raises(UsageError, match="every layer"):
            choose_bits(errors, sizes, 29)
