"""Planes of digits: what a code means, planes that are there to be found, and quality beside integers."""

import itertools

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import Format, Packed, parse_format
from bitpress.formats.grids import planes as planes
from bitpress.formats.grids.block_levels import SortedBlocks
from bitpress.formats.grids.planes import Planes

NAMES = ["planes2", "planes3", "planes4", "dual2", "trits2"]


def normal(seed: int, rows: int = 32, cols: int = 512) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def heavy(seed: int) -> torch.Tensor:
    """Student's t with 3 degrees of freedom, by its definition."""
    return normal(seed) / (normal(seed + 1, 96).square().view(3, 32, 512).mean(0)).sqrt()


def error(fmt: Format, w: torch.Tensor, importance: torch.Tensor | None = None, shrink: tuple[float, ...] = (1.0,)) -> float:
    params = fmt.fit(w, importance, shrink)
    difference = (fmt.decode(fmt.encode(w, params), params) - w).square()
    return float((difference if importance is None else difference * importance).sum())


def grid(name: str) -> Planes:
    found = parse_format(f"{name}-row").grid
    assert isinstance(found, Planes)
    return found


def test_a_code_is_its_digits() -> None:
    scale = {"scale": torch.tensor([[[4.0, 1.0]]])}
    signs = grid("planes2").decode(torch.arange(4)[None].to(torch.uint8), scale)
    assert signs.tolist() == [[-5.0, 3.0, -3.0, 5.0]]
    dual = grid("dual2").decode(torch.arange(4)[None].to(torch.uint8), {"scale": torch.tensor([[[2.0, 1.0]]])})
    assert sorted(dual[0].tolist()) == [-1.0, 0.0, 1.0, 2.0]  # the levels of int2
    trits = grid("trits2").decode(torch.arange(9)[None].to(torch.uint8), {"scale": torch.tensor([[[3.0, 1.0]]])})
    assert sorted(trits[0].tolist()) == [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]


def test_codes_of_trits_end_at_8() -> None:
    grid("trits2").check(torch.tensor([8], dtype=torch.uint8))
    with pytest.raises(FormatError, match="9 sums"):
        grid("trits2").check(torch.tensor([9], dtype=torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_planes_that_are_there_are_found(name: str) -> None:
    # Scales of which no two sums are near each other, in units that differ by a factor of 1,000 from row to row.
    scales = torch.tensor([[1.0, 0.43, 0.21, 0.1]]) * torch.logspace(-1, 2, 6)[:, None]
    scales = scales[:, : len(grid(name).digits)].to(torch.float16).float()
    codes = torch.randint(0, grid(name).num_codes, (6, 256), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    w = grid(name).decode(codes, {"scale": scales[:, None]})
    # fp32 scales: least squares ends within the ridge of the exact ones.
    assert error(parse_format(f"{name}-row-fp32"), w) < 1e-6 * float(w.square().sum())


@pytest.mark.parametrize("make", [normal, heavy])
@pytest.mark.parametrize(
    ("name", "other", "most"),
    [("planes2", "int2", 0.85), ("planes3", "int3", 0.95), ("planes4", "int4", 0.98), ("dual2", "int2", 0.95)],
)
@pytest.mark.parametrize("block", ["g128", "row"])
def test_planes_beat_integers_of_their_width(name: str, other: str, most: float, block: str, make: object) -> None:
    w = normal(2) if make is normal else heavy(2)
    clipped = error(parse_format(f"{other}-{block}"), w, shrink=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))
    assert error(parse_format(f"{name}-{block}"), w) < most * clipped


def test_two_trits_beat_three_signs_and_one_trit() -> None:
    w = normal(3)
    trits, signs, trit = (error(parse_format(f"{name}-g128"), w) for name in ("trits2", "planes3", "ternary"))
    assert trits < 0.9 * signs < 0.2 * trit


@pytest.mark.parametrize("name", NAMES)
def test_more_steps_are_never_worse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = heavy(4)[:8], torch.rand(512, generator=torch.Generator().manual_seed(5))
    blocks = SortedBlocks.of(w, importance.expand(w.shape))
    start = grid(name)._starts(blocks)[1]
    errors = [grid(name)._alternate(blocks, start, steps)[1] for steps in range(1, 12)]
    assert all(bool((b <= a).all()) for a, b in itertools.pairwise(errors))
    assert bool((errors[-1] < 0.9 * errors[0]).all())
    monkeypatch.setattr(planes, "STEPS", 1)
    few = error(parse_format(f"{name}-row-fp32"), w, importance)
    monkeypatch.undo()
    assert error(parse_format(f"{name}-row-fp32"), w, importance) <= few * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_importance_moves_the_scales(name: str) -> None:
    fmt, w = parse_format(f"{name}-row"), heavy(6)
    importance = torch.rand(32, 512, generator=torch.Generator().manual_seed(7)) ** 8
    plain = fmt.fit(w)
    unaware = float(((fmt.decode(fmt.encode(w, plain), plain) - w).square() * importance).sum())
    assert error(fmt, w, importance) < 0.95 * unaware


@pytest.mark.parametrize("digits", [((-1, 1),), ((-1, 1),) * 5, ((-1, 1), (0,)), ((-1, 1), (0, 1, 2, 3))])
def test_odd_planes_are_refused(digits: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(FormatError, match="2 to 4 planes"):
        Planes("odd", digits)


def test_two_trit_planes_take_1_6_bits_each() -> None:
    fmt = parse_format("trits2-g128-base3")
    assert fmt.nbytes((4, 640)) * 8 / (4 * 640) == 3.2 + 2 * 16 / 128
    w = torch.randn(4, 640, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(w)
    packed, dense = (Packed.pack(f, f.encode(w, params), params) for f in (fmt, parse_format("trits2-g128")))
    assert torch.equal(packed.dequantize(), dense.dequantize())
