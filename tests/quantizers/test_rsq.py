"""RSQ: GPTQ by weighted tokens."""

import dataclasses

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rsq import RSQ
from bitpress.quantizers.rtn import RTN

OUT, IN, TOKENS = 12, 32, 200


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    weights = torch.where(torch.arange(TOKENS) < 40, 3.0, 1.0)
    weights /= weights.mean()
    stats = Stats(TOKENS, x.T @ x / TOKENS, attention_gram=(x * weights[:, None]).T @ x / TOKENS)
    return torch.randn(OUT, IN, generator=generator), x, weights, stats


@pytest.mark.parametrize("fmt", ["int3-g16-zero", "int4-g16-zero", "nf4-g16"])
def test_important_tokens_come_out_better(fmt: str) -> None:
    ours, gptq, rtn = 0.0, 0.0, 0.0
    for seed in range(6):
        w, x, weights, stats = case(seed)
        parsed = parse_format(fmt)

        def missed(w_hat: torch.Tensor, w: torch.Tensor = w, x: torch.Tensor = x, weights: torch.Tensor = weights) -> float:
            return float(((x @ (w - w_hat).T).square().sum(1) * weights).sum())

        ours += missed(RSQ().quantize(w, stats, parsed).weight.dequantize())
        gptq += missed(GPTQ().quantize(w, stats, parsed).weight.dequantize())
        rtn += missed(RTN().quantize(w, None, parsed).weight.dequantize())
    assert ours < gptq < rtn


def test_it_is_gptq_by_the_weighted_gram() -> None:
    w, _, _, stats = case(0)
    fmt = parse_format("int3-g16-zero")
    weighted = Stats(TOKENS, stats.attention_gram)
    assert torch.equal(RSQ().quantize(w, stats, fmt).weight.dequantize(), GPTQ().quantize(w, weighted, fmt).weight.dequantize())
    assert RSQ.transforms == ("hadamard",)
    alike = RSQ().quantize(w, dataclasses.replace(stats, attention_gram=None), fmt)
    assert torch.equal(alike.weight.dequantize(), GPTQ().quantize(w, stats, fmt).weight.dequantize())
    assert "all tokens weigh the same" in alike.fallbacks[0]


def test_a_sick_weighted_gram_is_named_and_survived() -> None:
    w, _, _, stats = case(0)
    alive = (torch.arange(IN) % 4 != 0).float()
    gram = stats.need("attention_gram", "test")
    for sick in (gram * alive * alive[:, None], torch.outer(gram[0], gram[0]), gram * 1e30, gram * 1e-30):
        outcome = RSQ().quantize(w, dataclasses.replace(stats, attention_gram=sick), parse_format("int4-g16"))
        assert torch.isfinite(outcome.weight.dequantize()).all()
        assert output_error(w, outcome.weight.dequantize(), None) < 0.5
    dead = RSQ().quantize(w, dataclasses.replace(stats, attention_gram=gram * alive * alive[:, None]), parse_format("int4-g16"))
    assert dead.fallbacks == ()


def test_settings_are_checked() -> None:
    for wrong in ({"clip": "all"}, {"damp": 0.0}, {"order": "random"}):
        with pytest.raises(UsageError):
            RSQ(**wrong)  # type: ignore[arg-type]
