"""Laws of changes of basis, over every row of the table: the function stays, weights that share an input share its rotation."""

from typing import Any

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, FormatError, UsageError
from bitpress.formats import Chain, CompressedWeight, Hadamard, Kronecker, Map, Scale, parse_format
from bitpress.formats.terms.sparse import sparse
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rtn import RTN
from bitpress.transforms.balance import balance
from bitpress.transforms.basis import into_basis, with_maps
from bitpress.transforms.klt import KLT
from bitpress.transforms.table import BASIS_CHANGES

FMT = parse_format("int4-g16")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BASIS_CHANGES if name != "reassemble"),  # an approximation: tests/transforms/test_reassemble.py
    ("hadamard", {"block": "group", "outputs": True}),
    ("hadamard", {"block": 8}),
    ("orthogonal", {"rescale": False, "permute": False}),
    ("orthogonal", {"outputs": False}),
    ("klt", {"parts": 4, "whole": True}),
]


ROTATIONS = ("hadamard", "orthogonal", "klt")


def case(seed: int = 0, out: int = 24, inner: int = 48) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.logspace(-2, 1, inner)
    x = torch.randn(300, inner, generator=generator) @ mix
    return torch.randn(out, inner, generator=generator), x, Stats(300, x.T @ x / 300, x.abs().mean(0))


def exactly(w: torch.Tensor) -> CompressedWeight:
    """A weight that is kept whole, in float16."""
    return CompressedWeight((sparse(w, torch.ones_like(w, dtype=torch.bool)),))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_function_stays(name: str, settings: dict[str, Any]) -> None:
    w, x, stats = case()
    maps = BASIS_CHANGES[name](**settings).plan(w, stats, FMT)
    inner = into_basis(w, maps)
    input_map, output_map = maps
    y = inner @ (x if input_map is None else input_map.apply(x)).T
    y = y.T if output_map is None else output_map.apply(y.T)
    # Float32 products of up to 48 terms, through at most four factors.
    torch.testing.assert_close(y, x @ w.T, rtol=0, atol=float((x @ w.T).abs().max()) * 1e-4)
    assert not torch.allclose(inner, w)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_mapped_statistics_are_those_of_the_mapped_input(name: str, settings: dict[str, Any]) -> None:
    w, x, stats = case(1)
    change = BASIS_CHANGES[name](**settings).plan(w, stats, FMT)[0]
    assert change is not None
    mapped, seen = stats.mapped(change), change.apply(x)
    assert mapped.gram is not None
    assert mapped.tokens == 300
    torch.testing.assert_close(mapped.gram, seen.T @ seen / 300, rtol=0, atol=float(mapped.gram.abs().max()) * 1e-4)
    assert (mapped.mean_abs is None) == (name in ROTATIONS)


def test_a_scale_keeps_what_belongs_to_a_channel() -> None:
    _, x, stats = case(2)
    factor = torch.logspace(-1, 1, 48)
    mapped = stats.mapped(Scale(factor))
    torch.testing.assert_close(mapped.mean_abs, (x * factor).abs().mean(0))
    assert Stats(3).mapped(Scale(factor)) == Stats(3)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_an_exact_quantizer_gives_the_weight_back(name: str, settings: dict[str, Any]) -> None:
    w, _, stats = case(3)
    maps = BASIS_CHANGES[name](**settings).plan(w, stats, FMT)
    inner = into_basis(w, maps)
    step = float(inner.abs().max()) * 2.0**-11  # float16
    back = with_maps(exactly(inner), maps).dequantize()
    undone = 1.0
    parts = maps[0].maps if isinstance(maps[0], Chain) else [maps[0]]
    for part in parts:
        undone = float(part.scale.max()) if isinstance(part, Scale) else undone
    # Every rounding error is at most `step`; rotations keep the norm of all of them.
    assert (back - w).norm() <= step * undone * w.numel() ** 0.5


def rotations(change: Map | None) -> list[Map]:
    return [m for m in (change.maps if isinstance(change, Chain) else [change]) if m is not None and not isinstance(m, Scale)]


@pytest.mark.parametrize(("name", "settings"), [c for c in CASES if c[0] in ROTATIONS])
def test_weights_that_share_an_input_share_its_rotation(name: str, settings: dict[str, Any]) -> None:
    (first, _, stats), (second, _, _) = case(4, out=24), case(5, out=40)
    change, other = BASIS_CHANGES[name](**settings), BASIS_CHANGES[name](seed=1, **settings)
    a, b, c = (rotations(p.plan(w, stats, FMT)[0]) for p, w in ((change, first), (change, second), (other, first)))
    assert a
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        for leaf, value in one.tensors().items():
            assert torch.equal(value, two.tensors()[leaf])
    assert any(not torch.equal(v, c[i].tensors()[leaf]) for i, m in enumerate(a) for leaf, v in m.tensors().items())


def test_outliers_are_spread() -> None:
    w, _, stats = case(6)
    w[:, 5] *= 100
    for name in ROTATIONS:
        inner = into_basis(w, BASIS_CHANGES[name]().plan(w, stats, FMT))
        # The largest entry over the root mean square: Gaussian afterwards, about 10 before.
        assert inner.abs().max() / inner.square().mean().sqrt() < 5.5, name


def test_balance_is_the_formula_and_helps() -> None:
    w, _, stats = case(7)
    gram = stats.need_gram("test")
    d = balance(w, gram)
    expected = (gram.diagonal() / (w.T @ w).diagonal()) ** 0.25
    torch.testing.assert_close(d / d[0], expected / expected[0])
    # The energies of both sides are then in one ratio in every channel.
    ratio = gram.diagonal() / d**2 / (w * d).square().sum(0)
    torch.testing.assert_close(ratio, ratio[:1].expand(48))
    errors = []
    for rescale in (False, True):
        maps = BASIS_CHANGES["orthogonal"](rescale=rescale).plan(w, stats, FMT)
        weight = with_maps(RTN().quantize(into_basis(w, maps), None, FMT).weight, maps)
        errors.append(output_error(w, weight.dequantize(), stats))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("sickness", [0.0, 1e-30, 1e30])
def test_sick_statistics_give_a_usable_balance(sickness: float) -> None:
    w, _, stats = case(8)
    gram = stats.need_gram("test") * sickness
    dead = torch.arange(48) % 3 == 0
    gram[dead] = gram[:, dead] = 0.0
    w[:, 1] = 0.0
    d = balance(w, gram)
    assert 1e-2 <= d.min() <= d.max() <= 1e2  # the fourth root of 1e-8 either way
    maps = BASIS_CHANGES["orthogonal"]().plan(w, Stats(300, gram), FMT)
    torch.testing.assert_close(with_maps(exactly(into_basis(w, maps)), maps).dequantize(), w, rtol=0, atol=0.05)


def test_settings_and_statistics_are_checked() -> None:
    w, _, stats = case(9)
    for name in ROTATIONS:
        with pytest.raises(UsageError, match="seed"):
            BASIS_CHANGES[name](seed=-1)
    for name, change in BASIS_CHANGES.items():
        if change.needs:
            with pytest.raises(CalibrationError, match=f"{name}: no calibration statistics"):
                change().plan(w, None, FMT)
    for block in (1, "all", 2.5):
        with pytest.raises(UsageError, match="block="):
            BASIS_CHANGES["hadamard"](block=block)
    with pytest.raises(FormatError, match="does not fit"):
        BASIS_CHANGES["hadamard"](block=32).plan(w, stats, FMT)


def test_blocks_follow_the_format() -> None:
    w, _, stats = case(10)
    change = BASIS_CHANGES["hadamard"](block="group").plan(w, stats, FMT)[0]
    assert isinstance(change, Hadamard)
    assert change.block == 16
    whole = BASIS_CHANGES["hadamard"](block="group").plan(w, stats, parse_format("int4-row"))[0]
    assert isinstance(whole, Hadamard)
    assert whole.block == 48
    pair = BASIS_CHANGES["orthogonal"](rescale=False, permute=False).plan(w, stats, FMT)
    assert [type(m) for m in pair] == [Kronecker, Kronecker]


def test_the_karhunen_loeve_basis_sorts_by_variance_and_a_hadamard_matrix_makes_them_alike() -> None:
    w, _, stats = case(6)
    parts = rotations(KLT(parts=4, whole=True).plan(w, stats, FMT)[0])
    basis, order, mixing = parts
    spread = stats.mapped(Chain((basis, order))).need_gram("here")
    # The whole matrix diagonalizes the gram: float32 eigenvectors of a gram whose largest entry is the scale of the error.
    assert (spread - spread.diagonal().diag()).abs().max() < 1e-5 * spread.max()
    variance = spread.diagonal()
    assert (variance.diff() <= 1e-6 * variance.max()).all()
    mixed = stats.mapped(Chain((basis, order, mixing))).need_gram("here").diagonal().reshape(4, 12)
    torch.testing.assert_close(
        mixed, variance.reshape(4, 12).mean(1, keepdim=True).expand(4, 12), rtol=1e-3, atol=1e-4 * float(mixed.max())
    )
    # The product of two small matrices gets a part of that.
    cheap = rotations(KLT().plan(w, stats, FMT)[0])
    assert sum(t.numel() for t in cheap[0].tensors().values()) == 6**2 + 8**2
    by_part = [
        stats.mapped(Chain((c, o))).need_gram("here").diagonal()[:12].sum() for c, o in ((basis, order), (cheap[0], cheap[1]))
    ]
    assert by_part[0] > by_part[1] > 0.9 * stats.need_gram("here").trace()


def test_a_part_of_a_width_is_a_whole_number() -> None:
    w, _, stats = case()
    with pytest.raises(FormatError, match="48 channels is not a multiple of parts=5"):
        KLT(parts=5).plan(w, stats, FMT)
    with pytest.raises(UsageError, match="parts=0"):
        KLT(parts=0)


def test_channels_are_rearranged_by_size() -> None:
    w, _, stats = case(7)
    change = BASIS_CHANGES["rearrange"]().plan(w, stats, FMT)[0]
    seen = stats.mapped(change).need_gram("here").diagonal()
    assert torch.equal(seen, stats.need_gram("here").diagonal().sort(descending=True).values)
