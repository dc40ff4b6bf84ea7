"""COMQ: the greedy order, scales at their minimum, and an error that only falls."""

import itertools
from typing import Any

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import UsageError
from bitpress.formats import parse_format
from bitpress.quantizers.comq import COMQ, fit_scales, greedy_order
from bitpress.quantizers.mechanisms.coordinate_descent import prepare_descent
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rtn import RTN

OUT, IN = 8, 32


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return torch.randn(OUT, IN, generator=generator), x.T @ x / 64


def test_columns_come_by_what_their_weights_add() -> None:
    w, gram = case()
    added = [float(w[:, j].abs().sum()) * float(gram[j, j]) ** 0.5 for j in range(IN)]
    assert greedy_order(w, gram, 1).tolist() == sorted(range(IN), key=lambda j: -added[j])
    pairs = [added[j] + added[j + 1] for j in range(0, IN, 2)]
    leaders = sorted(range(IN // 2), key=lambda j: -pairs[j])
    assert greedy_order(w, gram, 2).tolist() == [2 * j + k for j in leaders for k in (0, 1)]


@pytest.mark.parametrize("name", ["int3-row-zero-fp32", "nf3-row-fp32"])
def test_the_scale_of_a_row_is_its_least_squares(name: str) -> None:
    w, gram = case(1)
    fmt = parse_format(name)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    found = fit_scales(w, codes, prepare_descent(gram, torch.arange(IN)), fmt, params)["scale"]
    q = (fmt.decode(codes, params) / params["scale"]).double()
    expected = ((w.double() @ gram.double()) * q).sum(1) / ((q @ gram.double()) * q).sum(1)
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-4, atol=0.0)


def test_every_scale_sees_those_before_it() -> None:
    w, gram = case(5)
    fmt = parse_format("int3-g8-zero-fp32")
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    found = fit_scales(w, codes, prepare_descent(gram, torch.arange(IN)), fmt, params)["scale"]
    q = fmt.decode(codes, {**params, "scale": torch.ones_like(params["scale"])}).double()
    scale = params["scale"].double()
    for block in range(IN // 8):
        own = torch.zeros_like(q)
        own[:, block * 8 : block * 8 + 8] = q[:, block * 8 : block * 8 + 8]
        left = w.double() - q * scale.repeat_interleave(8, 1)
        scale[:, block] += ((left @ gram.double()) * own).sum(1) / ((own @ gram.double()) * own).sum(1)
    torch.testing.assert_close(found.double(), scale, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", ["int3-g8-zero-fp32", "int4-2x16-fp32", "int4-tensor-fp32"])
def test_scales_in_turn_end_where_all_scales_together_do(name: str) -> None:
    w, gram = case(2)
    fmt = parse_format(name)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    descent = prepare_descent(gram, torch.arange(IN))
    rows, cols = fmt.block.resolve((OUT, IN))
    q = fmt.decode(codes, {**params, "scale": torch.ones_like(params["scale"])}).double()
    root = torch.linalg.cholesky(gram.double())
    errors = [float(descent.errors(w - fmt.decode(codes, params)).sum())]
    for _ in range(300):
        params = fit_scales(w, codes, descent, fmt, params)
        errors.append(float(descent.errors(w - fmt.decode(codes, params)).sum()))
    assert errors[1] < errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    for down in range(OUT // rows):
        own = slice(down * rows, (down + 1) * rows)
        parts = torch.zeros(IN // cols, rows, IN, dtype=torch.float64)
        for across in range(IN // cols):
            here = slice(across * cols, (across + 1) * cols)
            parts[across, :, here] = q[own, here]
        design = (parts @ root).reshape(IN // cols, -1).T
        expected = torch.linalg.lstsq(design, (w[own].double() @ root).reshape(-1, 1)).solution[:, 0]
        torch.testing.assert_close(params["scale"][down].double(), expected, rtol=1e-2, atol=1e-3)


def test_scales_stay_what_the_format_can_store() -> None:
    w, gram = case(3)
    descent = prepare_descent(gram, torch.arange(IN))
    for name in ("int3-g8-zero", "int3-g8-s4", "nf4-g16-dq", "int4-g8-e8m0"):
        fmt = parse_format(name)
        params = fmt.fit(w)
        codes = fmt.encode(w, params)
        found = fit_scales(w, codes, descent, fmt, params)
        before, after = (float(descent.errors(w - fmt.decode(codes, p)).sum()) for p in (params, found))
        assert after <= before
        outer = {part: params[f"scale_{part}"] for part in fmt.store.expected(1, 1) if part}
        assert torch.equal(fmt.store.round(found["scale"], outer), found["scale"])


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("name", ["int2-g16-zero", "int4-row", "nf3-g16"])
def test_more_sweeps_are_no_worse(name: str, start: Any) -> None:
    w, gram = case(4)
    stats, fmt = Stats(64, gram), parse_format(name)
    plain = output_error(w, RTN().quantize(w, None, fmt).weight.dequantize(), stats)
    errors = [
        output_error(w, COMQ(sweeps=n, start=start).quantize(w, stats, fmt).weight.dequantize(), stats) for n in (1, 2, 8)
    ]
    # The damping of 0.01 is in the error that falls, not in this one.
    assert errors[2] <= errors[1] * 1.02 <= errors[0] * 1.04
    assert errors[2] < 0.7 * plain


@pytest.mark.parametrize("settings", [{"sweeps": 0}, {"start": "rtn"}, {"damp": 0.0}, {"clip": "none"}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        COMQ(**settings)
