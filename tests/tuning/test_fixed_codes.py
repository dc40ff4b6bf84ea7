"""Parameters, factors and diagonals that are learned under fixed codes: each on one layer whose best values a formula gives."""

from collections.abc import Mapping

import pytest
import torch

from bitpress.formats import CompressedWeight, Hadamard, Kept, LowRank, Packed, Scale, chain, parse_format
from bitpress.tuning.fixed_codes import FixedCodes
from bitpress.tuning.learned import LearnedWeight, Start
from bitpress.tuning.objectives import LayerObjective
from bitpress.tuning.table import TUNINGS
from bitpress.tuning.tuner import Tuning, begin_weight, tune_

OUT, IN = 8, 32


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(w: torch.Tensor, name: str) -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def learned(tuning: Tuning, weight: CompressedWeight, original: torch.Tensor) -> LearnedWeight:
    one = begin_weight(tuning, weight, original)
    assert one is not None
    return one


def run(
    tuning: Tuning, weight: CompressedWeight, original: torch.Tensor
) -> tuple[CompressedWeight, LearnedWeight, float, float]:
    """Learn a weight by its squared error on white inputs."""
    one = learned(tuning, weight, original)
    curve = tune_(LayerObjective("w", original, torch.eye(original.shape[1]), None), {"w": one}, tuning)
    return one.harden(), one, curve.before, curve.after


def settings(name: str, **changed: object) -> Tuning:
    plain: dict[str, object] = {"steps": 300, "rate": 2e-2}
    return TUNINGS[name](**(plain | changed))


def relative(w_hat: torch.Tensor, w: torch.Tensor) -> float:
    return float((w_hat - w).square().sum() / w.square().sum())


def built_again(weight: CompressedWeight) -> CompressedWeight:
    tensors: Mapping[str, torch.Tensor] = {name: t.clone() for name, t in weight.tensors().items()}
    return CompressedWeight.build(weight.spec(), tensors)


def test_real_vectors_of_quip_sharp_find_a_known_diagonal() -> None:
    """A weight that is the compressed one between two diagonals is met exactly, and stored in the maps that were there."""
    generator = torch.Generator().manual_seed(3)
    maps = Hadamard.random(IN, IN, generator), Hadamard.random(OUT, OUT, generator)
    weight = CompressedWeight((packed(draw(OUT, IN), "e8p-row"),), *maps)
    s, t = 1 + 0.2 * draw(IN, seed=1), 1 + 0.2 * draw(OUT, seed=2)
    original = t[:, None] * weight.dequantize() * s
    made, one, before, after = run(settings("quip-sharp", steps=300, norms=0.0), weight, original)
    assert before > 0.03
    assert after < before / 100
    assert relative(made.dequantize(), original) < before / 100
    assert torch.equal(one.hard_value(), built_again(made).dequantize())
    spec = made.spec()
    assert [m["kind"] for m in spec["input_map"]["maps"]] == ["scale", "hadamard"]
    assert [m["kind"] for m in spec["output_map"]["maps"]] == ["hadamard", "scale"]
    again = learned(settings("quip-sharp"), made, original).harden()
    assert [m["kind"] for m in again.spec()["input_map"]["maps"]] == ["scale", "hadamard"], "scales side by side are one"


def test_a_weight_without_maps_gets_none_from_quip_sharp() -> None:
    weight = CompressedWeight((packed(draw(OUT, IN), "e8p-row"),))
    assert settings("quip-sharp").begin_sides(weight) is None


def test_every_packed_term_learns_its_parameters() -> None:
    """The second book of QuIP# as well as the first."""
    w = draw(OUT, IN)
    first = packed(w, "e8p-row")
    second = packed(w - first.dequantize(), "e8p-row")
    weight = CompressedWeight((first, second))
    original = 0.9 * first.dequantize() + 1.3 * second.dequantize()
    _, _, before, after = run(settings("parameters", norms=0.0), weight, original)
    assert after < before / 1000


@pytest.mark.parametrize("name", ["decoupleq", "parameters"])
def test_scales_and_float_zeros_reach_least_squares(name: str) -> None:
    """decoupleQ's second stage: with fixed integers the best scale and zero point of every row are a straight line's."""
    w = draw(OUT, IN) + 0.3
    weight = CompressedWeight((packed(w, "int2-row-zerofp16"),))
    codes = weight.terms[0].unpack()[0].double()  # type: ignore[attr-defined]
    line = torch.stack([codes, torch.ones_like(codes)], dim=2)
    fitted = (line @ torch.linalg.lstsq(line, w.double()[..., None]).solution)[..., 0]
    made, _, before, _ = run(settings(name, norms=0.0), weight, w)
    best = relative(fitted.float(), w)
    assert relative(made.dequantize(), w) < best + 0.02 * (before - best)
    assert torch.equal(made.terms[0].unpack()[0].double(), codes)  # type: ignore[attr-defined]


def test_factors_of_ptq161_find_a_known_row_and_column() -> None:
    w = draw(OUT, IN)
    salient = torch.zeros(IN, dtype=torch.bool)
    salient[::5] = True
    high = Kept.place(packed(w[:, salient], "int4-row-zero"), "columns", salient)
    low = Kept.place(packed(w[:, ~salient], "binary-row"), "columns", ~salient)
    weight = CompressedWeight((high, low), Scale(1 + 0.1 * draw(IN, seed=4).abs()))
    rows, columns = 1 + 0.2 * draw(OUT, seed=5), 1 + 0.2 * draw(IN, seed=6)
    original = (high.dequantize() + rows[:, None] * low.dequantize()) * columns * weight.input_map.scale  # type: ignore[union-attr]
    made, one, before, after = run(settings("ptq161", loss="mse", steps=300), weight, original)
    assert before > 0.02
    assert after < before / 100
    assert isinstance(made.input_map, Scale), "the factors of columns go into the scale that was there"
    assert torch.equal(one.hard_value(), built_again(made).dequantize())


@pytest.mark.parametrize("dtype", ["fp16", "int8-row"])
def test_a_low_rank_term_reaches_the_best_of_its_rank(dtype: str) -> None:
    """INT2.1's: from a poor pair of factors, the error comes near to the singular values that the rank must leave."""
    w = draw(OUT, IN)
    codes = packed(w, "int2-row-zero")
    error = w - codes.dequantize()
    values = torch.linalg.svdvals(error)
    best = float(values[2:].square().sum() / w.square().sum())
    term = LowRank.store(draw(OUT, 2, seed=7) * 0.05, draw(2, IN, seed=8) * 0.05, dtype)
    made, one, before, after = run(settings("low-rank", steps=600, rate=5e-2), CompressedWeight((codes, term)), w)
    assert best <= after < best + 0.05 * (before - best)
    assert torch.equal(one.hard_value(), built_again(made).dequantize())
    assert made.terms[0] is codes, "the codes stay"


def test_ranges_and_factors_are_learned_together() -> None:
    """ApiQ: a range that is too wide and factors that are too small, each learned; both bring more than the factors alone."""
    w = draw(OUT, IN)
    fmt = parse_format("int3-row")
    params = {"scale": 1.6 * fmt.fit(w)["scale"]}
    codes = Packed.pack(fmt, fmt.encode(w, params), fmt.stored(params))
    term = LowRank.store(draw(OUT, 2, seed=7) * 0.05, draw(2, IN, seed=8) * 0.05, "fp16")
    weight = CompressedWeight((codes, term))
    made, one, before, after = run(settings("apiq", rate=5e-2), weight, w)
    _, _, _, alone = run(settings("low-rank", rate=5e-2), weight, w)
    assert after < 0.9 * alone < 0.9 * before
    assert torch.equal(one.hard_value(), built_again(made).dequantize())


def test_sides_in_a_chain_keep_the_other_maps() -> None:
    generator = torch.Generator().manual_seed(3)
    had = Hadamard.random(IN, IN, generator)
    weight = CompressedWeight((packed(draw(OUT, IN), "int4-row"),), chain(Scale(torch.full((IN,), 2.0)), had))
    one = learned(settings("quip-sharp"), weight, draw(OUT, IN))
    assert one.sides is not None
    assert one.sides.s is not None
    one.sides.s.data.mul_(3.0)
    assert torch.allclose(one.hard_value(), 3 * weight.dequantize(), rtol=1e-6, atol=1e-6)
    assert torch.allclose(one.value(0.0).detach(), one.hard_value(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "once"),
    [
        ("tcq2-row", True),
        ("tcq3-g16", True),
        ("e8p-row", True),
        ("gauss4x2-row", True),
        ("mxfp4", False),
        ("int3-g16-zero", False),
        ("trits2-g16", False),
    ],
)
def test_codes_are_decoded_once_where_a_scale_only_multiplies(name: str, once: bool) -> None:
    """The values of a step are those that its parameters are decoded to, to the bit, where scales have moved too."""
    w = draw(64, 64, seed=5)
    codes = FixedCodes(Start.of(packed(w, name), w))
    for leaf in codes.leaves():
        leaf.tensor.data.copy_(0.1 * draw(*leaf.tensor.shape, seed=6))
    assert (codes.unit is not None) == once
    assert torch.equal(codes.weight(0.5), codes.harden().dequantize())
