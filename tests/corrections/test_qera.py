"""QERA's term: of all terms of its rank, the one with the smallest error of the output."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.corrections.lorc import LoRC
from bitpress.corrections.lqer import LQER
from bitpress.corrections.qera import QERA
from bitpress.formats import CompressedWeight, parse_format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantizer import output_error

FMT = parse_format("int3-g16")


def case(out: int, inner: int) -> tuple[torch.Tensor, CompressedWeight, Stats]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inner, inner, generator=generator) * torch.exp(1.5 * torch.randn(inner, generator=generator))
    x = torch.randn(300, inner, generator=generator) @ mix
    w, stats = torch.randn(out, inner, generator=generator), Stats(300, x.T @ x / 300, x.abs().mean(0))
    return w, GPTQ().quantize(w, stats, FMT).weight, stats


@pytest.mark.parametrize("out", [40, 96])
def test_the_output_error_left_is_that_of_the_singular_values_left(out: int) -> None:
    w, codes, stats = case(out, 64)
    gram = stats.need_gram("test").double()
    error = (w - codes.dequantize()).double()
    root = torch.linalg.cholesky(gram)
    u, size, v = torch.linalg.svd(error @ root)
    best = torch.linalg.solve_triangular(root, (u[:, :6] * size[:6]) @ v[:6], upper=False, left=False)
    term = QERA(rank=6).repair(w, codes, stats).dequantize().double()
    after = error - term
    # As for LoRC: 2^-10 of every component for factors in fp16.
    assert float(((after @ gram) * after).sum()) <= float(size[6:].square().sum()) + (2**-10 * float(size.norm())) ** 2
    assert ((term - best) @ root).norm() < 2**-9 * float(size[:6].norm())
    assert QERA().split(w, stats, FMT) is None


def test_the_heuristics_leave_more() -> None:
    w, codes, stats = case(40, 64)
    errors = [
        output_error(w, codes.dequantize() + part.repair(w, codes, stats).dequantize(), stats)
        for part in (QERA(rank=6), LQER(rank=6), LoRC(rank=6))
    ]
    assert errors[0] < 0.95 * min(errors[1:])


def test_inputs_of_one_size_without_relation_give_lorcs_term() -> None:
    w, codes, _ = case(40, 64)
    even = Stats(300, torch.eye(64) * 4)
    plain = LoRC(rank=6).repair(w, codes, None).dequantize()
    for stats in (even, None):
        torch.testing.assert_close(QERA(rank=6).repair(w, codes, stats).dequantize(), plain, rtol=0, atol=1e-3)
