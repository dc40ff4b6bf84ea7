"""aespa against a loop over single codes of a head's Kronecker Hessian, and by the error of the attention."""

import dataclasses

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.aespa import Aespa
from bitpress.quantizers.boa import BoA, attention_error
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantease import QuantEase
from bitpress.quantizers.rtn import RTN

HEADS, ROW, IN = 3, 8, 16


def grams(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.rand(size, generator=generator)
    x = torch.randn(count, 200, size, generator=generator) @ mix
    return x.mT @ x / 200


def scores_case(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    w = torch.randn(HEADS * ROW, IN, generator=torch.Generator().manual_seed(seed))
    return w, Stats(200, grams(1, IN, seed + 20)[0], row_gram=grams(HEADS, ROW, seed + 10))


def values_case(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    w, stats = scores_case(seed)
    return w, dataclasses.replace(stats, head_gram=grams(HEADS, IN, seed + 30))


def damped(gram: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    return (gram / gram.diagonal().mean() + damp * torch.eye(len(gram))).double()


@pytest.mark.parametrize("name", ["int3-g16-zero", "int3-2x16-zero", "nf3-row"])
def test_a_sweep_is_the_loop_over_single_codes(name: str) -> None:
    """From GPTQ's codes, every code of a head in turn takes the level that lessens tr(R E G E') most."""
    w, stats = scores_case()
    fmt = parse_format(name)
    outcome = Aespa(sweeps=1, order="natural").quantize(w, stats, fmt)
    start = GPTQ(order="natural").quantize(w, stats, fmt).weight
    params = start.terms[0].unpack_params()  # type: ignore[attr-defined]
    for head in range(HEADS):
        rows = slice(head * ROW, (head + 1) * ROW)
        hessian = torch.kron(damped(stats.need("row_gram", "test")[head]), damped(stats.need_gram("test")))
        flat, now = w[rows].double().flatten(), start.dequantize()[rows].double().flatten()
        for i in range(len(flat)):
            best = now[i] + (flat - now) @ hessian[:, i] / hessian[i, i]
            row = head * ROW + i // IN
            at = fmt.columns(params, (HEADS * ROW, IN), i % IN)
            at = {p.name: at[p.name][row] if p.scope == "block" else at[p.name] for p in fmt.grid.params}
            now[i] = fmt.grid.decode(fmt.grid.encode(best.float()[None], at), at).item()
        got = outcome.weight.dequantize()[rows].double().flatten()
        # A value that lies between two levels to the last digit may go either way, and what follows with it.
        assert (got - now).abs().gt(1e-5).sum() <= 2


@pytest.mark.parametrize("fmt", ["int3-g16-zero", "int2-row-zero", "nf4-g16", "int4-2x16-zero"])
def test_scores_lose_less_than_by_boa_and_gptq(fmt: str) -> None:
    ours, boa, gptq, rtn = 0.0, 0.0, 0.0, 0.0
    for seed in range(6):
        w, stats = scores_case(seed)
        parsed = parse_format(fmt)
        ours += attention_error(w, Aespa().quantize(w, stats, parsed).weight.dequantize(), stats)
        boa += attention_error(w, BoA(rows=1).quantize(w, stats, parsed).weight.dequantize(), stats)
        gptq += attention_error(w, GPTQ().quantize(w, stats, parsed).weight.dequantize(), stats)
        rtn += attention_error(w, RTN().quantize(w, None, parsed).weight.dequantize(), stats)
    assert ours < 0.98 * boa < 0.95 * gptq < 0.95 * rtn


def test_values_lose_less_in_what_each_head_mixes() -> None:
    ours, gptq = 0.0, 0.0
    parsed = parse_format("int3-g16-zero")
    for seed in range(6):
        w, stats = values_case(seed)
        mixed = dataclasses.replace(stats, row_gram=torch.eye(ROW).expand(HEADS, ROW, ROW))
        ours += attention_error(w, Aespa().quantize(w, stats, parsed).weight.dequantize(), mixed)
        gptq += attention_error(w, GPTQ().quantize(w, stats, parsed).weight.dequantize(), mixed)
    assert ours < 0.9 * gptq


def test_a_weight_without_heads_is_swept_as_by_quantease() -> None:
    w, stats = scores_case()
    plain = Stats(200, stats.gram)
    fmt = parse_format("int3-g16-zero")
    ours = Aespa(sweeps=5, relax_every=3).quantize(w, plain, fmt).weight.dequantize()
    assert torch.equal(ours, QuantEase(sweeps=5, relax_every=3).quantize(w, plain, fmt).weight.dequantize())


def test_no_head_ends_worse_than_it_began() -> None:
    """Unrelated heads: a head whose sweeps gain nothing keeps the codes of error feedback."""
    w, stats = scores_case(3)
    fmt = parse_format("int2-row-zero")
    before = GPTQ().quantize(w, stats, fmt).weight.dequantize()
    after = Aespa(sweeps=1).quantize(w, stats, fmt).weight.dequantize()
    gram = damped(stats.need_gram("test")).float()
    for head, by_row in enumerate(stats.need("row_gram", "test")):
        rows = slice(head * ROW, (head + 1) * ROW)
        first, last = ((damped(by_row).float() @ (w - x)[rows] @ gram * (w - x)[rows]).sum() for x in (before, after))
        assert last <= first * (1 + 1e-5)


def test_a_sick_row_gram_is_named_and_survived() -> None:
    w, stats = scores_case()
    by_row = stats.need("row_gram", "test").clone()
    by_row[1] = -torch.ones(ROW, ROW) * 1e3 + 1001 * torch.eye(ROW)
    outcome = Aespa().quantize(w, dataclasses.replace(stats, row_gram=by_row), parse_format("int4-g16"))
    assert outcome.fallbacks == ("1 heads' row grams could not be factored; the rows of these heads are rounded independently",)
    plain = Aespa().quantize(w, Stats(200, stats.gram), parse_format("int4-g16")).weight.dequantize()
    # Apart, each row is swept as without heads; codes of the start are kept by the head, not by the row.
    rows, gram = slice(ROW, 2 * ROW), stats.need_gram("test")
    left = [((w - x)[rows] @ gram * (w - x)[rows]).sum() for x in (outcome.weight.dequantize(), plain)]
    assert left[0] <= left[1] * 1.05
    for sick in (by_row * 0, by_row * 1e30, by_row * 1e-38, by_row * torch.nan, by_row[:, :1] * torch.ones(ROW, 1)):
        outcome = Aespa().quantize(w, dataclasses.replace(stats, row_gram=sick), parse_format("int4-g16"))
        assert torch.isfinite(outcome.weight.dequantize()).all()
    with pytest.raises(CalibrationError, match="2 heads do not fit a weight of 24 rows"):
        Aespa().quantize(w, dataclasses.replace(stats, row_gram=by_row[:2]), parse_format("int4-g16"))


def test_settings_are_checked() -> None:
    for wrong in ({"sweeps": 0}, {"relax_every": 1}, {"damp": 0.0}, {"order": "random"}):
        with pytest.raises(UsageError):
            Aespa(**wrong)  # type: ignore[arg-type]
