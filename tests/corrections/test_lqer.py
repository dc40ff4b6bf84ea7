"""LQER's term: the leading part of the error in scaled channels, scaled back."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.corrections.lorc import LoRC
from bitpress.corrections.lqer import LQER, input_scale
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Permutation, parse_format
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.rtn import RTN

FMT = parse_format("int3-g16")


def case() -> tuple[torch.Tensor, CompressedWeight, Stats]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) * torch.exp(1.5 * torch.randn(64, generator=generator))
    w = torch.randn(40, 64, generator=generator)
    return w, RTN().quantize(w, None, parse_format("int3-g16")).weight, Stats(300, x.T @ x / 300, x.abs().mean(0))


@pytest.mark.parametrize("scale", ["mean_abs", "rms"])
def test_it_is_the_leading_part_of_the_scaled_error(scale: str) -> None:
    w, rounded, stats = case()
    term = LQER(rank=6, scale=scale).repair(w, rounded, stats)  # type: ignore[arg-type]
    s = stats.mean_abs if scale == "mean_abs" else stats.need_gram("test").diagonal().sqrt()
    error = (w - rounded.dequantize()) * s
    u, size, v = torch.linalg.svd(error)
    # As for LoRC: 2^-10 of every component for factors in fp16.
    assert (term.dequantize() * s - (u[:, :6] * size[:6]) @ v[:6]).norm() < 2**-10 * float(size[:6].norm())
    assert LQER().split(w, stats, FMT) is None


def test_the_output_is_nearer_than_with_a_term_that_does_not_see_it() -> None:
    w, rounded, stats = case()
    errors = [
        output_error(w, rounded.dequantize() + part.repair(w, rounded, stats).dequantize(), stats)
        for part in (LQER(rank=6), LoRC(rank=6))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_inputs_of_one_size_give_lorcs_term() -> None:
    w, rounded, _ = case()
    even = Stats(300, torch.eye(64) * 4, torch.full((64,), 2.0))
    assert torch.equal(LQER(rank=6).repair(w, rounded, even).dequantize(), LoRC(rank=6).repair(w, rounded, None).dequantize())
    assert torch.equal(LQER(rank=6).repair(w, rounded, None).dequantize(), LoRC(rank=6).repair(w, rounded, None).dequantize())


def test_the_scale_is_relative_and_bounded() -> None:
    stats = Stats(8, torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.tensor([1.0, 0.25, 0.0]))
    assert input_scale(stats, "mean_abs").tolist() == pytest.approx([1.0, 0.25, 1e-4])
    assert input_scale(stats, "rms").tolist() == pytest.approx([1.0, 0.5, 1e-4])


def test_where_the_mean_magnitude_is_unknown_the_root_mean_square_stands_for_it() -> None:
    w, rounded, stats = case()
    turned = Stats(300, stats.gram)
    assert torch.equal(
        LQER(rank=4).repair(w, rounded, turned).dequantize(), LQER(rank=4, scale="rms").repair(w, rounded, stats).dequantize()
    )
    order = Permutation(torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32))
    assert stats.mapped(order).mean_abs is not None, "a permutation leaves it known"


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(UsageError, match="'mean_abs' or 'rms'"):
        LQER(scale="max")  # type: ignore[arg-type]
