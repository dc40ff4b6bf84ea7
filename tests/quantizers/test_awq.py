"""AWQ's rounding: every block is clipped as its own part of the output wants it."""

import pytest
import torch

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, FormatError, UsageError
from bitpress.formats import Format, parse_format
from bitpress.quantizers.awq import AWQ
from bitpress.quantizers.rtn import RTN, shrink_ratios

TOKENS, OUT, IN = 96, 24, 64
FORMATS = ["int3-g16", "int4-g32-zero", "int2-row", "int3-8x16", "int4-tensor-fp32", "int2-g16-zero-bf16"]


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    torch.manual_seed(seed)
    # Heavy tails in the weights and correlated inputs of unlike size: clipping has something to win and the gram something to say.
    w = torch.randn(OUT, IN) * torch.exp(0.7 * torch.randn(OUT, IN))
    x = (torch.randn(TOKENS, IN) @ torch.randn(IN, IN)) * torch.exp(torch.randn(IN))
    return w, x, Stats(TOKENS, x.T @ x / TOKENS)


def partial_errors(w: torch.Tensor, w_hat: torch.Tensor, x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Mean squared change of every block's part of the output, from the inputs themselves, block by block."""
    rows, cols = fmt.block.resolve((OUT, IN))
    errors = torch.zeros(OUT // rows, IN // cols, dtype=torch.float64)
    for i in range(OUT // rows):
        for j in range(IN // cols):
            r, c = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
            errors[i, j] = (x[:, c].double() @ (w_hat - w)[r, c].double().T).square().sum() / TOKENS
    return errors


@pytest.mark.parametrize("name", FORMATS)
def test_every_block_has_the_best_of_its_limits(name: str) -> None:
    fmt, (w, x, stats) = parse_format(name), layer()
    rows, cols = fmt.block.resolve((OUT, IN))
    tried = []
    for ratio in shrink_ratios("mse", 10, 0.5):
        clamped = w.clone()
        for i in range(0, OUT, rows):
            for j in range(0, IN, cols):
                block = clamped[i : i + rows, j : j + cols]
                limit = block.abs().max() * ratio  # in float32: a zero point of 7.5 falls to either side by the last bit
                block.clamp_(-limit, limit)
        params = fmt.fit(clamped)
        tried.append(partial_errors(w, fmt.decode(fmt.encode(w, params), params), x, fmt))
    best = torch.stack(tried).amin(0)
    outcome = AWQ().quantize(w, stats, fmt)
    got = partial_errors(w, outcome.weight.dequantize(), x, fmt)
    # The quantizer's errors go through a float32 gram and float32 sums of at most 64 * 24 terms: relative 1e-4 at most, and a
    # near tie may be decided either way.
    torch.testing.assert_close(got, best, rtol=1e-3, atol=0)
    assert (got <= tried[0] * (1 + 1e-3)).all()
    assert got.sum() < 0.99 * tried[0].sum()
    assert 0 < outcome.figures["clipped"] <= 1


def test_the_gram_decides_and_not_the_weights_error() -> None:
    fmt, (w, x, stats) = parse_format("int2-g16"), layer(1)
    by_output = AWQ(steps=20).quantize(w, stats, fmt).weight.dequantize()
    by_weight = RTN(clip="mse").quantize(w, None, fmt).weight.dequantize()
    assert partial_errors(w, by_output, x, fmt).sum() < 0.98 * partial_errors(w, by_weight, x, fmt).sum()
    assert (by_output - w).square().sum() > (by_weight - w).square().sum()


def test_a_white_input_gives_the_clipping_of_least_weight_error() -> None:
    fmt, (w, _, _) = parse_format("int3-row"), layer(2)
    got = AWQ().quantize(w, Stats(TOKENS, torch.eye(IN)), fmt).weight.dequantize()
    errors = []
    for ratio in shrink_ratios("mse", 10, 0.5):
        limit = w.abs().amax(1, keepdim=True) * ratio
        params = fmt.fit(w.clamp(-limit, limit))
        errors.append((fmt.decode(fmt.encode(w, params), params) - w).square().sum(1))
    torch.testing.assert_close((got - w).square().sum(1), torch.stack(errors).amin(0), rtol=1e-5, atol=0)


def test_a_weight_on_the_grid_stays_exact() -> None:
    torch.manual_seed(3)
    w = torch.randint(-8, 8, (OUT, IN)).float() / 8
    w[:, ::32] = -1.0  # every group of 32 uses its lowest level
    outcome = AWQ().quantize(w, layer()[2], parse_format("int4-g32"))
    assert torch.equal(outcome.weight.dequantize(), w)
    assert outcome.figures["clipped"] == 0


def test_zero_and_half_precision_weights_are_taken() -> None:
    _, _, stats = layer()
    fmt = parse_format("int4-g32-zero")
    assert torch.equal(AWQ().quantize(torch.zeros(OUT, IN), stats, fmt).weight.dequantize(), torch.zeros(OUT, IN))
    w = layer(4)[0].bfloat16()
    kept = w.clone()
    half = AWQ().quantize(w, stats, fmt).weight.dequantize()
    assert torch.equal(half, AWQ().quantize(w.float(), stats, fmt).weight.dequantize())
    assert torch.equal(w, kept)


def test_what_is_missing_is_said() -> None:
    w, _, stats = layer()
    for nothing in (None, Stats(0), Stats(TOKENS)):
        with pytest.raises(CalibrationError, match="awq"):
            AWQ().quantize(w, nothing, parse_format("int4-g32"))
    with pytest.raises(FormatError, match="not a multiple"):
        AWQ().quantize(w, stats, parse_format("int4-g48"))
    with pytest.raises(UsageError, match="steps"):
        AWQ(steps=1)
    with pytest.raises(UsageError, match="smallest"):
        AWQ(smallest=1.0)


def test_it_names_its_transform() -> None:
    assert AWQ.transforms == ("awq-scale",)
    assert AWQ.needs == {"gram"}
