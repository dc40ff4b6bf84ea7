"""The target of QEP is the least-squares answer to the inputs that there are, and what cannot be known is named."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import parse_format
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.gptaq import GPTAQ
from bitpress.quantizers.mechanisms.error_feedback import prepare
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Named, build_method, make_recipe
from bitpress.transforms.balance import Balance
from bitpress.transforms.hadamard import HadamardBasis
from bitpress.transforms.qep import QEP

TOKENS, INNER = 600, 64


def case(noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Stats]:
    """A weight, an input, the same input in the uncompressed model, and what is seen of both."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(INNER, INNER, generator=generator) / 8
    original = torch.randn(TOKENS, INNER, generator=generator) @ mix
    x = original + noise * torch.randn(TOKENS, INNER, generator=generator) @ mix.T
    w = torch.randn(48, INNER, generator=generator)
    cross = (original - x).T @ x / TOKENS
    return w, x, original, Stats(TOKENS, x.T @ x / TOKENS, x.abs().mean(0), cross)


def miss(w: torch.Tensor, target: torch.Tensor, x: torch.Tensor, original: torch.Tensor) -> float:
    """How far the output is from the uncompressed model's."""
    return float((x @ target.T - original @ w.T).square().mean())


def test_with_all_its_strength_it_is_the_least_squares_answer() -> None:
    w, x, original, stats = case()
    aimed, fallbacks = QEP(strength=1.0, damp=1e-6).aim(w, stats)
    best = torch.linalg.lstsq(x.double(), (original @ w.T).double()).solution.T
    torch.testing.assert_close(aimed.double(), best, rtol=1e-3, atol=1e-3)
    assert not fallbacks


def test_more_strength_misses_less_and_damping_holds_it_back() -> None:
    w, x, original, stats = case()
    misses = [miss(w, QEP(strength=s, damp=0.01).aim(w, stats)[0], x, original) for s in (0.25, 0.5, 0.75, 1.0)]
    assert sorted([miss(w, w, x, original), *misses], reverse=True) == [miss(w, w, x, original), *misses]
    moves = [float((QEP(damp=d).aim(w, stats)[0] - w).norm()) for d in (0.01, 0.1, 1.0, 10.0)]
    assert sorted(moves, reverse=True) == moves


def test_it_is_the_whole_shift_of_gptaq() -> None:
    w, _, _, stats = case()
    feedback = prepare(stats.need_gram("test"), "natural", 1, 0.01, 10.0)
    assert feedback.factor is not None
    assert stats.cross is not None
    shift = GPTAQ(strength=0.5, target="whole")._shift(w, stats.cross, feedback, feedback.factor)
    torch.testing.assert_close(QEP(strength=0.5, damp=0.01).aim(w, stats)[0], w + shift, rtol=1e-4, atol=1e-4)


def test_the_same_target_in_another_basis() -> None:
    w, x, original, stats = case()
    fmt = parse_format("int8-row")
    plain = compress_matrix(
        w, stats, LayerMethod(fmt, Named("quantizer", "", RTN()), targets=tuple([QEP()]))
    ).weight.dequantize()
    turned = compress_matrix(
        w, stats, LayerMethod(fmt, Named("quantizer", "", RTN()), changes=tuple([HadamardBasis()]), targets=tuple([QEP()]))
    ).weight.dequantize()
    torch.testing.assert_close(turned, plain, rtol=0, atol=0.05)
    assert miss(w, plain, x, original) < miss(w, RTN().quantize(w, stats, fmt).weight.dequantize(), x, original)
    scaled = compress_matrix(
        w, stats, LayerMethod(fmt, Named("quantizer", "", RTN()), changes=tuple([Balance()]), targets=tuple([QEP()]))
    ).weight.dequantize()
    assert miss(w, scaled, x, original) < miss(w, w, x, original)


def test_what_cannot_be_known_leaves_the_weight_and_is_named() -> None:
    w, _, _, stats = case()
    for seen in (None, Stats(TOKENS, stats.gram)):
        aimed, fallbacks = QEP().aim(w, seen)
        assert torch.equal(aimed, w)
        assert fallbacks[0].startswith("the inputs in the uncompressed model are unknown")
    assert stats.cross is not None
    for cross in (stats.cross * 1e6, stats.cross * float("nan")):
        aimed, fallbacks = QEP().aim(w, Stats(TOKENS, stats.gram, cross=cross))
        assert torch.equal(aimed, w)
        assert "is larger than the weight" in fallbacks[0]
    with pytest.raises(CalibrationError, match="no calibration statistics"):
        QEP().aim(w, Stats(0, None, cross=stats.cross))
    named = compress_matrix(
        w,
        Stats(TOKENS, stats.gram),
        LayerMethod(parse_format("int4-g16"), Named("quantizer", "", RTN()), targets=tuple([QEP()])),
    )
    assert "are unknown" in named.fallbacks[0]


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_inputs_of_any_size_give_the_same_target(size: float) -> None:
    w, _, _, stats = case()
    assert stats.gram is not None
    assert stats.cross is not None
    dead = Stats(TOKENS, torch.zeros_like(stats.gram), cross=torch.zeros_like(stats.cross))
    assert torch.equal(QEP().aim(w, dead)[0], w)
    scaled = Stats(TOKENS, stats.gram * size, cross=stats.cross * size)
    torch.testing.assert_close(QEP().aim(w, scaled)[0], QEP().aim(w, stats)[0], rtol=1e-4, atol=1e-5)


def test_settings_and_inputs_that_make_no_sense_are_refused() -> None:
    for wrong in ({"strength": 0}, {"strength": 1.5}, {"damp": 0}):
        with pytest.raises(UsageError):
            QEP(**wrong)
    with pytest.raises(UsageError, match=r"calibration\.inputs must be pressed"):
        make_recipe({"transforms": ["qep"], "quantizer": "rtn", "calibration": {"inputs": "original"}})
    recipe = make_recipe({"transforms": ["hadamard", "qep"], "quantizer": "rtn"})
    assert [name for name, _ in [(p.name, p.part) for p in build_method(recipe).of("target")]] == ["qep"]
    assert [name for name, _ in [(p.name, p.part) for p in build_method(recipe).changes]] == ["hadamard"]
