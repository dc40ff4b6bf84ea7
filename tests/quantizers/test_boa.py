"""BoA against GPTQ on the whole of a head at once, and by the error of the attention."""

import dataclasses

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.boa import BoA, attention_error
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.rtn import RTN

HEADS, ROW, IN = 3, 8, 16


def grams(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.rand(size, generator=generator)
    x = torch.randn(count, 200, size, generator=generator) @ mix
    return x.mT @ x / 200


def case(seed: int = 0, *, by_head: bool = True) -> tuple[torch.Tensor, Stats]:
    w = torch.randn(HEADS * ROW, IN, generator=torch.Generator().manual_seed(seed))
    own = grams(HEADS, IN, seed + 20)
    return w, Stats(200, own.mean(0), row_gram=grams(HEADS, ROW, seed + 10), head_gram=own if by_head else None)


def damped(gram: torch.Tensor, damp: float) -> torch.Tensor:
    return (gram + damp * gram.diagonal().mean() * torch.eye(len(gram))).double()


@pytest.mark.parametrize("by_head", [True, False])
def test_one_row_at_a_time_is_gptq_on_the_flattened_head(by_head: bool) -> None:
    """The Hessian of a head's weights is the Kronecker product of its two grams; feedback goes through its inverse's factor."""
    w, stats = case(by_head=by_head)
    fmt = parse_format("int3-g16-zero")
    outcome = BoA(rows=1, order="natural", clip="minmax").quantize(w, stats, fmt)
    params = fmt.fit(w)
    for head in range(HEADS):
        columns = stats.need("head_gram", "test")[head] if by_head else stats.need_gram("test")
        hessian = torch.kron(damped(stats.need("row_gram", "test")[head], 0.01), damped(columns, 0.01))
        factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        flat = w[head * ROW : (head + 1) * ROW].double().flatten()
        rounded = torch.zeros_like(flat)
        for i in range(len(flat)):
            row, column = head * ROW + i // IN, i % IN
            at = {name: value[row] for name, value in fmt.columns(params, (HEADS * ROW, IN), column).items()}
            code = fmt.grid.encode(flat[i : i + 1].float()[None], at)
            rounded[i] = fmt.grid.decode(code, at).item()
            flat[i:] -= (flat[i] - rounded[i]) / factor[i, i] * factor[i, i:]
        got = outcome.weight.dequantize()[head * ROW : (head + 1) * ROW].double().flatten()
        # A value that lies between two levels to the last digit may go either way; nothing else may differ.
        assert (got - rounded).abs().gt(1e-5).sum() <= 2


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("fmt", ["int3-g16-zero", "int3-row-zero", "nf4-g16", "int4-2x16-zero"])
def test_less_error_of_the_attention_than_gptq_and_rounding(fmt: str, by_head: bool, rows: int) -> None:
    ours, gptq, rtn = 0.0, 0.0, 0.0
    for seed in range(6):
        w, stats = case(seed, by_head=by_head)
        parsed = parse_format(fmt)
        ours += attention_error(w, BoA(rows=rows).quantize(w, stats, parsed).weight.dequantize(), stats)
        gptq += attention_error(w, GPTQ().quantize(w, stats, parsed).weight.dequantize(), stats)
        rtn += attention_error(w, RTN().quantize(w, None, parsed).weight.dequantize(), stats)
    assert ours < 0.95 * gptq < 0.95 * rtn


def test_a_weight_without_heads_is_rounded_as_by_gptq() -> None:
    w, stats = case()
    plain = Stats(200, stats.gram)
    fmt = parse_format("int3-g16-zero")
    assert torch.equal(BoA().quantize(w, plain, fmt).weight.dequantize(), GPTQ().quantize(w, plain, fmt).weight.dequantize())


def test_a_sick_row_gram_is_named_and_survived() -> None:
    w, stats = case()
    by_row = stats.need("row_gram", "test").clone()
    by_row[1] = -torch.ones(ROW, ROW) * 1e3 + 1001 * torch.eye(ROW)
    outcome = BoA(damp_limit=1.0).quantize(w, dataclasses.replace(stats, row_gram=by_row), parse_format("int4-g16"))
    assert "no feedback across its rows" in outcome.fallbacks[0]
    for sick in (by_row * 0, by_row * 1e30, stats.need("row_gram", "test")[:, :1] * torch.ones(ROW, 1)):
        outcome = BoA().quantize(w, dataclasses.replace(stats, row_gram=sick), parse_format("int4-g16"))
        assert torch.isfinite(outcome.weight.dequantize()).all()
    few = dataclasses.replace(stats, row_gram=by_row[:2], head_gram=stats.need("head_gram", "test")[:2])
    with pytest.raises(CalibrationError, match="do not fit a weight of 24 rows"):
        BoA().quantize(w, few, parse_format("int4-g16"))


def test_settings_are_checked() -> None:
    for wrong in ({"rows": 0}, {"damp": 0.0}, {"order": "random"}):
        with pytest.raises(UsageError):
            BoA(**wrong)  # type: ignore[arg-type]
