"""decoupleQ: least squares finds the numbers behind given codes, and alternation only gains."""

from typing import Any

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.decoupleq import DecoupleQ, solve_affine
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.mechanisms.coordinate_descent import prepare_descent
from bitpress.quantizers.quantizer import output_error

OUT, IN = 8, 32


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return torch.randn(OUT, IN, generator=generator), x.T @ x / 64


@pytest.mark.parametrize("name", ["int3-g8-zero-fp32", "int2-row-zero-fp32", "int4-2x16-zero-fp32", "int4-tensor-zero-fp32"])
def test_scales_and_zero_points_behind_codes_are_found(name: str) -> None:
    w, gram = case()
    fmt = parse_format(name)
    true = fmt.fit(w)
    codes = fmt.encode(w, true)
    exact = fmt.decode(codes, true)
    wrong = {"scale": true["scale"] * 1.7, "zero": (true["zero"] + 1) % fmt.grid.num_codes}
    found = solve_affine(exact, codes, prepare_descent(gram, torch.arange(IN)), fmt, wrong)
    assert torch.equal(found["zero"].float(), true["zero"].float())
    torch.testing.assert_close(found["scale"], true["scale"], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", ["int3-g8-fp32", "int4-2x16-fp32"])
def test_scales_alone_are_least_squares_over_all_groups_at_once(name: str) -> None:
    w, gram = case(1)
    fmt = parse_format(name)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    found = solve_affine(w, codes, prepare_descent(gram, torch.arange(IN)), fmt, params)["scale"]
    rows, cols = fmt.block.resolve((OUT, IN))
    root = torch.linalg.cholesky(gram.double())
    q = fmt.decode(codes, {"scale": torch.ones_like(params["scale"])}).double()
    for down in range(OUT // rows):
        own = slice(down * rows, (down + 1) * rows)
        parts = torch.zeros(IN // cols, rows, IN, dtype=torch.float64)
        for across in range(IN // cols):
            here = slice(across * cols, (across + 1) * cols)
            parts[across, :, here] = q[own, here]
        design = (parts @ root).reshape(IN // cols, -1).T
        expected = torch.linalg.lstsq(design, (w[own].double() @ root).reshape(-1, 1)).solution[:, 0]
        torch.testing.assert_close(found[down].double(), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", ["int2-g16-zero", "int3-g8-zero-s6", "int2-row", "int4-2x16-zero"])
def test_no_row_is_worse_for_its_new_numbers(name: str) -> None:
    w, gram = case(2)
    fmt = parse_format(name)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    descent = prepare_descent(gram, torch.arange(IN))
    rows, _ = fmt.block.resolve((OUT, IN))
    before, after = (
        descent.errors(w - fmt.decode(codes, p)).view(-1, rows).sum(1)
        for p in (params, solve_affine(w, codes, descent, fmt, params))
    )
    assert (after <= before).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("name", ["int2-g16-zero", "int3-row"])
def test_rounds_gain_on_error_feedback_alone(name: str, sweeps: int) -> None:
    w, gram = case(3)
    stats, fmt = Stats(64, gram), parse_format(name)
    outcomes = [DecoupleQ(rounds=n, sweeps=sweeps).quantize(w, stats, fmt) for n in (1, 4)]
    errors = [output_error(w, o.weight.dequantize(), stats) for o in outcomes]
    # The damping of 0.01 is in the error that falls, not in this one.
    assert errors[1] <= errors[0] * 1.02
    assert errors[0] < output_error(w, GPTQ().quantize(w, stats, fmt).weight.dequantize(), stats)
    assert 0 < outcomes[0].figures["gain"] <= outcomes[1].figures["gain"] < 1


def test_formats_without_scaled_integers_are_refused() -> None:
    w, gram = case()
    with pytest.raises(FormatError, match=r"decoupleq serves int\*, not .*, not nf4-g16"):
        DecoupleQ().quantize(w, Stats(64, gram), parse_format("nf4-g16"))


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"sweeps": -1}, {"damp": 0.0}, {"order": "random"}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DecoupleQ(**settings)
