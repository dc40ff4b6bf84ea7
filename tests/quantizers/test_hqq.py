"""HQQ: the shrinkage, one step, and a norm that only falls."""

from typing import Any

import pytest
import torch

from bitpress.errors import FormatError, UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.hqq import HQQ, shrink
from bitpress.quantizers.rtn import RTN


def weight(out: int = 16, inner: int = 64) -> torch.Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(0)) * 0.1


def test_in_norm_1_the_shrinkage_is_the_minimum() -> None:
    e = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for x in (-2.0, -0.3, -0.05, 0.0, 0.04, 0.5, 1.7):
        least = e[(e.abs() + 10.0 / 2 * (e - x).square()).argmin()]
        assert abs(float(shrink(torch.tensor(x, dtype=torch.float64), 10.0, 1.0)) - float(least)) < 2e-4


def test_the_shrinkage_of_a_small_norm() -> None:
    # 0.5 - 0.5^(0.7 - 1) / 10 = 0.3769, and below 0.1^(1 / 1.3) = 0.170 nothing is left.
    values = shrink(torch.tensor([0.5, -0.5, 0.171, 0.169, 0.0]), 10.0, 0.7)
    torch.testing.assert_close(values[:2], torch.tensor([0.3769, -0.3769]), rtol=0.0, atol=1e-4)
    assert values[2] > 0
    assert values[3] == 0
    assert values[4] == 0


@pytest.mark.parametrize(
    "name", ["int3-g16-zero-fp32", "int4-row-fp32", "int3-2x16-zero-fp32", "int4-g16-zerofp16-fp32", "int4-g16-zerofp32-fp32"]
)
def test_a_step_is_the_mean_of_a_block(name: str) -> None:
    w, fmt = weight(), parse_format(name)
    params = fmt.fit(w)
    found = HQQ().step(w, fmt, params, 2000.0)
    codes, w_hat = fmt.encode(w, params), fmt.decode(fmt.encode(w, params), params)
    rows, cols = fmt.block.resolve((16, 64))
    for down, across in ((0, 0), (3, 64 // cols - 1)):
        own = slice(down * rows, (down + 1) * rows), slice(across * cols, (across + 1) * cols)
        zero = float(params["zero"][down, across]) if "zero" in params else float(2 ** (fmt.grid.code_bits - 1))
        q, target = codes[own].float() - zero, w[own] - shrink(w[own] - w_hat[own], 2000.0, 0.7)
        scale = (target * q).sum() / q.square().sum() if not fmt.variant.startswith("zerofp") else params["scale"][down, across]
        torch.testing.assert_close(found["scale"][down, across], scale, rtol=1e-4, atol=0.0)
        if "zero" in params:
            mean = (codes[own].float() - target / scale).mean()
            stored = mean.round().clamp(0, fmt.grid.num_codes - 1) if fmt.variant == "zero" else mean
            stored = stored.half().float() if fmt.variant == "zerofp16" else stored
            assert float(found["zero"][down, across]) == pytest.approx(
                float(stored), rel=2**-10 if fmt.variant.startswith("zerofp") else 0
            )


@pytest.mark.parametrize("name", ["int2-g16-zero", "int4-g16", "int3-2x16-zero", "int4-g16-zero-s6", "int4-g16-zerofp16"])
def test_no_block_is_worse_in_the_norm(name: str) -> None:
    w, fmt = weight(), parse_format(name)
    outcome = HQQ().quantize(w, None, fmt)
    rows, cols = fmt.block.resolve((16, 64))
    ours, plain = (
        (w - q.quantize(w, None, fmt).weight.dequantize()).abs().pow(0.7).view(-1, rows, 64 // cols, cols).sum((1, 3))
        for q in (HQQ(), RTN())
    )
    assert (ours <= plain * (1 + 1e-6)).all()
    assert outcome.figures["moved"] == float((ours < plain).float().mean()) > 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_between_codes_are_worth_more_than_their_bits_in_the_norm(bits: int) -> None:
    """The method's own format: floats move, codes do not. Both with the scales of the range."""
    w = weight(64, 256)
    lost = []
    for zero in ("zero", "zerofp16"):
        w_hat = HQQ(scales=False).quantize(w, None, parse_format(f"int{bits}-g64-{zero}")).weight.dequantize()
        lost.append(float((w - w_hat).abs().pow(0.7).sum()))
    assert lost[1] < 0.97 * lost[0]


def test_formats_without_scaled_integers_are_refused() -> None:
    with pytest.raises(FormatError, match=r"hqq serves int\*, not .*, not nf4-g16"):
        HQQ().quantize(weight(), None, parse_format("nf4-g16"))


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"norm": 0.0}, {"norm": 1.5}, {"beta": 0.0}, {"growth": 0.9}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        HQQ(**settings)
