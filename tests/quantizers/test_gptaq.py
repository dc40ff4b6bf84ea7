"""GPTAQ against its formula column by column, and against what it is for: the outputs of the uncompressed model."""

import dataclasses

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.gptaq import GPTAQ
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.mechanisms.error_feedback import prepare
from bitpress.quantizers.rtn import RTN

OUT, IN, TOKENS = 12, 16, 300


def case(seed: int = 0, apart: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator) * torch.rand(IN, generator=generator)
    original = torch.randn(TOKENS, IN, generator=generator) @ mix
    x = original + apart * torch.randn(TOKENS, IN, generator=generator) @ mix.flip(0)
    w = torch.randn(OUT, IN, generator=generator)
    return w, x, original, Stats(TOKENS, x.T @ x / TOKENS, cross=(original - x).T @ x / TOKENS)


def missed(w: torch.Tensor, w_hat: torch.Tensor, x: torch.Tensor, original: torch.Tensor) -> float:
    """The squared distance of the compressed layer's outputs from the original model's."""
    return float((original @ w.T - x @ w_hat.T).square().sum())


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_the_shift_is_what_each_column_asks_of_those_behind_it(order: str) -> None:
    """Column j leaves w_j d_j x' unanswered; the least-squares answer of the columns after j is that times inv(gram[>j, >j])."""
    w, _, _, stats = case()
    gram, cross = stats.need_gram("test"), stats.need("cross", "test")
    feedback = prepare(gram, order, 1, 0.01, 10.0)
    at = feedback.order
    damped = (gram + 0.01 * gram.diagonal().mean() * torch.eye(IN)).double()[at][:, at]
    wanted = torch.zeros(OUT, IN, dtype=torch.float64)
    for j in range(IN - 1):
        answer = torch.linalg.inv(damped[j + 1 :, j + 1 :])
        wanted[:, j + 1 :] += torch.outer(w[:, at[j]].double(), cross.double()[at[j], at[j + 1 :]] @ answer)
    assert feedback.factor is not None
    got = GPTAQ(strength=1.0)._shift(w, cross, feedback, feedback.factor)[:, at]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_whole_shift_is_the_least_squares_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(TOKENS, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    original = x + 0.3 * torch.randn(TOKENS, IN, generator=generator) + 0.2 * x.flip(1)
    cross = (original - x).T @ x / TOKENS
    feedback = prepare(x.T @ x / TOKENS, "activation", 1, 1e-6, 10.0)
    assert feedback.factor is not None
    shift = GPTAQ(strength=1.0, target="whole")._shift(w, cross, feedback, feedback.factor)
    best = torch.linalg.lstsq(x.double(), (original @ w.T).double()).solution.T
    torch.testing.assert_close((w + shift).double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["order", "whole"])
@pytest.mark.parametrize("fmt", ["int4-g16-zero", "int3-row-zero", "nf4-g16"])
def test_nearer_to_the_original_model_than_gptq_and_rounding(fmt: str, target: str) -> None:
    ours, gptq, rtn = 0.0, 0.0, 0.0
    for seed in range(6):
        w, x, original, stats = case(seed)
        parsed = parse_format(fmt)
        ours += missed(w, GPTAQ(strength=1.0, target=target).quantize(w, stats, parsed).weight.dequantize(), x, original)
        gptq += missed(w, GPTQ().quantize(w, stats, parsed).weight.dequantize(), x, original)
        rtn += missed(w, RTN().quantize(w, None, parsed).weight.dequantize(), x, original)
    assert ours < 0.99 * gptq < 0.99 * rtn


def test_without_a_difference_it_is_gptq() -> None:
    w, _, _, stats = case(1)
    same = dataclasses.replace(stats, cross=torch.zeros(IN, IN))
    fmt = parse_format("int3-g16-zero")
    ours, gptq = GPTAQ().quantize(w, same, fmt), GPTQ().quantize(w, same, fmt)
    for name, value in gptq.weight.tensors().items():
        assert torch.equal(ours.weight.tensors()[name], value)
    assert ours.fallbacks == ()
    unknown = GPTAQ().quantize(w, dataclasses.replace(stats, cross=None), fmt)
    assert torch.equal(unknown.weight.dequantize(), gptq.weight.dequantize())
    assert "are unknown" in unknown.fallbacks[0]


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_cross_that_asks_for_another_weight_is_left_out(factor: float) -> None:
    w, _, _, stats = case(2)
    sick = dataclasses.replace(stats, cross=stats.need("cross", "test") * factor)
    outcome = GPTAQ().quantize(w, sick, parse_format("int4-g16"))
    assert "larger than the weight" in outcome.fallbacks[0]
    assert torch.isfinite(outcome.weight.dequantize()).all()


def test_settings_are_checked() -> None:
    for wrong in ({"target": "all"}, {"strength": 1.5}, {"strength": -0.1}, {"damp": 0.0}):
        with pytest.raises(UsageError):
            GPTAQ(**wrong)  # type: ignore[arg-type]
