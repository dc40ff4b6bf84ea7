"""Scales in coarse stores: of the stored scales around the wanted one, a fit keeps the one with the least error."""

import math

import pytest
import torch

from bitpress.formats import SCALES, Format, Params, parse_format
from bitpress.quantizers.rtn import shrink_ratios

COARSE = sorted(name for name in SCALES if SCALES[name].beside(torch.ones(1, 1), SCALES[name].outer(torch.ones(1, 1))))
SEARCH = shrink_ratios("mse", 20, 0.5)


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def by_block(fmt: Format, w: torch.Tensor, params: Params, importance: torch.Tensor | None = None) -> torch.Tensor:
    squares = (fmt.decode(fmt.encode(w, params), params) - w).double().square()
    return fmt.to_blocks(squares if importance is None else squares * importance).sum(-1)


def relative(name: str, shrink: tuple[float, ...] = (1.0,)) -> float:
    fmt, w = parse_format(name), normal(16, 2048)
    return float(by_block(fmt, w, fmt.fit(w, shrink=shrink)).sum() / w.double().square().sum())


def test_stores_of_a_few_bits_are_coarse() -> None:
    runs = {"s4x16", "s6x8", "i6x8", "i6x16", "i8x16"}
    assert set(COARSE) == {"e8m0", "fp8", "fp8over", "s4", "s6", "s8", "p2row", "dq"} | runs


@pytest.mark.parametrize("name", COARSE)
def test_the_scales_beside_are_the_next_ones_that_the_store_holds(name: str) -> None:
    store = SCALES[name]
    scale = normal(4, 64).abs()
    outer = store.outer(scale)
    dense = torch.linspace(float(scale.min()) / 4, float(scale.max()) * 2, 20001)
    for row in range(4):
        shared = {part: t[row : row + 1] if len(t) > 1 else t for part, t in outer.items()}
        for column in range(0, 64, 7):
            of_this = {part: t[:, column : column + 1] if t.shape[1] > 1 else t for part, t in shared.items()}
            held = store.round(dense[None], of_this).unique()
            here = scale[row : row + 1, column : column + 1]
            nearest = store.round(here, of_this)
            found = store.beside(here, of_this)
            assert found is not None
            below, above = held[held < nearest[0]], held[held > nearest[0]]
            # The dense scales begin at a quarter of the smallest one and end at twice the largest.
            if len(below):
                assert float(found[0]) == float(below[-1])
            if len(above):
                assert float(found[1]) == float(above[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shrink", [(1.0,), SEARCH])
@pytest.mark.parametrize("store", COARSE)
@pytest.mark.parametrize("grid", ["int8", "int5-zero", "e3m3", "olive4", "gauss6", "bipolar6"])
def test_no_scale_beside_the_full_range_is_better(grid: str, store: str, shrink: tuple[float, ...], weighted: bool) -> None:
    head, _, zero = grid.partition("-")
    fmt = parse_format(f"{head}-g32-{store}{'-' * bool(zero)}{zero}")
    w = normal(4, 512, 3)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(4)) if weighted else None
    chosen = fmt.fit(w, importance, shrink)
    error = by_block(fmt, w, chosen, importance)
    fitted = fmt.grid.fit(fmt.to_blocks(w), None if importance is None else fmt.to_blocks(importance.expand(w.shape)))
    scale = fitted["scale"].reshape(chosen["scale"].shape)
    outer = {part: chosen[f"scale_{part}"] for part in fmt.store.expected(1, 1) if part}
    below, above = fmt.store.beside(scale, outer) or (scale, scale)
    nearest = fmt.store.round(scale, outer)
    plain = len(shrink) == 1 and fmt.grid.code_bits / fmt.grid.span > fmt.store.fine_bits
    other = torch.where(nearest < scale, above, torch.where(nearest > scale, below, nearest))
    around = [other] if plain else [below, above] if len(shrink) > 1 else []
    zeros = {name: t.reshape(chosen[name].shape) for name, t in fitted.items() if name != "scale"}
    for tried in (nearest, *around):
        trial = {**chosen, **zeros, "scale": tried}
        # Equal up to the order of a sum.
        assert (error <= by_block(fmt, w, trial, importance) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("name", "most", "rounded_to_nearest"),
    [
        ("int8-g32-e8m0", 6e-5, 4.2e-3),
        ("int6-g32-e8m0", 9.5e-4, 4.6e-3),
        ("int4-g32-e8m0", 0.0126, 0.0133),
        ("e2m3-g32-e8m0", 8e-4, 4.0e-3),
        ("nf4-g32-e8m0", 0.0100, 0.0124),
        ("int8-g32-p2row", 7e-5, 4.7e-3),
        ("int8-g32-fp8", 3.3e-5, 9.8e-5),
        ("int8-g32-s4", 3.4e-5, 1.2e-4),
    ],
)
def test_a_coarse_store_does_not_cost_more_than_the_codes(name: str, most: float, rounded_to_nearest: float) -> None:
    """Errors of Gaussian weights; the last figure is what the nearest scale alone leaves."""
    assert relative(name) < most < rounded_to_nearest
    assert relative(name, SEARCH) < most


@pytest.mark.parametrize(
    ("name", "most"), [("mxfp8", 7.2e-4), ("mxfp4", 0.0126), ("mxfp6", 7.9e-4), ("mxfp6e3m2", 2.8e-3), ("bfp8-g32", 6e-4)]
)
def test_a_search_under_mx_takes_the_better_of_the_floor_and_the_next_power(name: str, most: float) -> None:
    fmt, w = parse_format(name), normal(16, 2048)
    floor = fmt.fit(w)
    # Plain, the floor rule of OCP: the largest magnitude has the exponent of the largest level.
    largest = fmt.to_blocks(w).abs().amax(-1).reshape(floor["scale"].shape)
    top = max(level for level in fmt.grid.levels if not math.isnan(level))  # type: ignore[attr-defined]
    exponents = torch.frexp(largest)[1] - 1 - math.floor(math.log2(top))
    assert torch.equal(floor["scale"], torch.exp2(exponents.double()).float())
    up = {**floor, "scale": 2 * floor["scale"]}
    best = torch.minimum(by_block(fmt, w, floor), by_block(fmt, w, up))
    searched = by_block(fmt, w, fmt.fit(w, shrink=SEARCH))
    assert (searched <= best * (1 + 1e-5)).all()
    assert searched.sum() < 0.999 * by_block(fmt, w, floor).sum()
    assert relative(name, SEARCH) < most


def test_every_plane_of_a_block_may_move_its_scale() -> None:
    fmt, w = parse_format("planes2-g32-e8m0"), normal(8, 256, 5)
    fitted = fmt.grid.fit(fmt.to_blocks(w))["scale"]
    nearest = fmt.store.round(fitted, {})
    error = by_block(fmt, w, fmt.fit(w))
    assert (error <= by_block(fmt, w, {"scale": nearest.reshape(8, 8, 2)}) * (1 + 1e-5)).all()
    changed = fmt.fit(w)["scale"].reshape(nearest.shape) != nearest
    assert changed[..., 0].any()
    assert changed[..., 1].any()
