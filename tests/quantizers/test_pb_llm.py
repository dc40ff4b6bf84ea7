"""PB-LLM: salient weights by the paper's measure, kept exactly; everything else one bit with error feedback."""

from typing import Any

import pytest
import torch

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Kept, Packed, Sparse, parse_format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.pb_llm import PBLLM
from bitpress.quantizers.quantizer import output_error

OUT, IN = 16, 32


def layer(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(OUT, IN, generator=generator) ** 3
    x = torch.randn(300, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return w, Stats(300, x.T @ x / 300)


def by_hand(w: torch.Tensor, gram: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's algorithm for one scale a row, in float64, one column after another in their natural order."""
    w = w.double().clone()
    h = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(IN)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    saliency = w.square() / u.diagonal().square()
    salient = saliency >= saliency.flatten().sort(descending=True).values[count - 1]
    weight = gram.diagonal() * ~salient
    scale = ((w.abs() * weight).sum(1) / weight.sum(1)).half().double()
    w_hat = torch.zeros_like(w)
    for j in range(IN):
        sign = torch.where(w[:, j] < 0, -1.0, 1.0)
        w_hat[:, j] = torch.where(salient[:, j], w[:, j], sign * scale)
        error = (w[:, j] - w_hat[:, j]) / u[j, j]
        w[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
    return w_hat, salient


def test_it_is_the_algorithm_of_the_paper() -> None:
    w, stats = layer()
    outcome = PBLLM(salient=0.1, store="fp16", order="natural").quantize(w, stats, parse_format("binary-row"))
    expected, salient = by_hand(w, stats.need_gram("test"), int(0.1 * w.numel()))
    packed, kept = outcome.weight.terms
    assert isinstance(packed, Packed)
    assert isinstance(kept, Sparse)
    assert torch.equal(kept.dequantize() != 0, salient)
    # A salient weight is its code and a float16: half of 2^-10 of what the code lacks. Codes and scales are those of float64.
    torch.testing.assert_close(outcome.weight.dequantize().double(), expected, rtol=0, atol=float(w.abs().max()) * 2**-10)
    assert torch.equal(torch.sign(packed.dequantize())[~salient], torch.sign(expected)[~salient].float())


def test_eight_bits_and_a_mask_hold_the_salient_weights_of_every_row() -> None:
    w, stats = layer(4)
    outcome = PBLLM(salient=0.25, order="natural").quantize(w, stats, parse_format("binary-row"))
    packed, kept = outcome.weight.terms
    assert isinstance(kept, Kept)
    # A bit a weight for the mask, a byte a salient weight, a scale a row.
    assert kept.tensors["mask"].numel() == w.numel() // 8
    assert sum(t.numel() * t.element_size() for t in kept.tensors.values()) == w.numel() // 8 + w.numel() // 4 + 2 * OUT
    chosen = kept.chosen()
    h = stats.need_gram("test").double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(IN)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    saliency = w.double().square() / u.diagonal().square()
    assert torch.equal(chosen, saliency >= saliency.sort(1, descending=True).values[:, IN // 4 - 1 : IN // 4])
    # What is stored makes up for the code's error to half a step, and the rest of the error moves later columns.
    open_, w_hat = w.double().clone(), outcome.weight.dequantize().double()
    step = kept.packed.unpack_params()["scale"].double()
    for j in range(IN):
        error = open_[:, j] - w_hat[:, j]
        lacking = (open_[:, j] - packed.dequantize()[:, j])[:, None].abs()
        near = (error[:, None].abs() <= step * 0.51) | (lacking > 126 * step) | ~chosen[:, j : j + 1]
        assert near.all()
        open_[:, j + 1 :] -= torch.outer(error / u[j, j], u[j, j + 1 :])


def test_magnitude_takes_the_largest_weights() -> None:
    w, stats = layer(1)
    outcome = PBLLM(salient=0.05, store="fp16", measure="magnitude").quantize(w, stats, parse_format("binary-g16"))
    kept = outcome.weight.terms[1].dequantize() != 0
    assert int(kept.sum()) == int(0.05 * w.numel())
    assert float(w[kept].abs().min()) >= float(w[~kept].abs().max())
    assert outcome.figures["salient"] == pytest.approx(0.05, abs=1 / w.numel())


def test_without_salient_weights_it_is_gptq() -> None:
    w, stats = layer(2)
    fmt = parse_format("int2-g16-zero")
    ours = PBLLM(salient=0.0).quantize(w, stats, fmt).weight.dequantize()
    assert torch.equal(ours, GPTQ().quantize(w, stats, fmt).weight.dequantize())


@pytest.mark.parametrize("store", ["int8", "fp16"])
@pytest.mark.parametrize("fmt", ["binary-g16", "ternary-row", "int2-g16-zero", "e8p-row"])
def test_more_salient_weights_leave_less_error(fmt: str, store: Any) -> None:
    w, stats = layer(3)
    errors = [
        output_error(w, PBLLM(salient=part, store=store).quantize(w, stats, parse_format(fmt)).weight.dequantize(), stats)
        for part in (0.0, 0.05, 0.2, 0.9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_what_cannot_be_is_refused() -> None:
    w, _ = layer()
    with pytest.raises(UsageError, match="salient=1"):
        PBLLM(salient=1.0)
    with pytest.raises(UsageError, match="'int8' or 'fp16'"):
        PBLLM(store="int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="measure"):
        PBLLM(measure="taste")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="pb_llm"):
        PBLLM().quantize(w, None, parse_format("binary-g16"))
