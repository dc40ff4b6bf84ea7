"""JLCM's beginning: like rows share a codebook, and the order is undone."""

import pytest
import torch

from bitpress.errors import FormatError, UsageError
from bitpress.formats import Packed, Permutation, parse_format
from bitpress.quantizers.jlcm import JLCM
from bitpress.quantizers.rtn import RTN

OUT, IN = 32, 64


def weight() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of four sizes, mixed; give also each row's size."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 10.0, 100.0, 1000.0]).repeat(OUT // 4)[torch.randperm(OUT, generator=generator)]
    return torch.randn(OUT, IN, generator=generator) * size[:, None], size


@pytest.mark.parametrize("name", ["kmeans3-tensor", "int4-tensor-zero", "nf4-tensor"])
def test_every_group_is_what_its_rows_alone_would_be(name: str) -> None:
    w, size = weight()
    outcome = JLCM(groups=4).quantize(w, None, parse_format(name))
    w_hat = outcome.weight.dequantize()
    for of in (1.0, 10.0, 100.0, 1000.0):
        rows = size == of
        own = w[rows][torch.argsort(w[rows].square().mean(1), stable=True)]
        expected = RTN(clip="mse", steps=20, smallest=0.3).quantize(own, None, parse_format(name)).weight.dequantize()
        got = w_hat[rows][torch.argsort(w[rows].square().mean(1), stable=True)]
        assert torch.equal(got, expected)


def test_a_codebook_a_group_and_an_order_is_all_that_is_stored() -> None:
    w, _ = weight()
    weight_ = JLCM(groups=4).quantize(w, None, parse_format("kmeans4-tensor")).weight
    (term,) = weight_.terms
    assert isinstance(term, Packed)
    assert term.format.name == f"kmeans4-{OUT // 4}x{IN}"
    assert isinstance(weight_.output_map, Permutation)
    assert weight_.nbytes == OUT * IN // 2 + 4 * 16 * 2 + OUT * 2
    one = RTN(clip="mse").quantize(w, None, parse_format("kmeans4-tensor")).weight.dequantize()
    small = w.abs().amax(1) < 50
    assert (weight_.dequantize() - w)[small].norm() < 0.1 * (one - w)[small].norm()


def test_the_codebook_is_the_best_of_its_group() -> None:
    w = torch.tensor([[0.0, 1.0, 5.0, 9.0], [0.1, 1.1, 5.1, 9.1], [-30.0, 60.0, 10.0, 90.0], [-30.0, 60.0, 10.0, 91.0]])
    w_hat = JLCM(groups=2).quantize(w, None, parse_format("kmeans2-tensor")).weight.dequantize()
    expected = torch.tensor([[0.05, 1.05, 5.05, 9.05]] * 2 + [[-30.0, 60.0, 10.0, 90.5]] * 2)
    torch.testing.assert_close(w_hat, expected, rtol=2.0**-11, atol=1e-4)  # fp16 levels


def test_what_is_wrong_is_said() -> None:
    w, _ = weight()
    with pytest.raises(UsageError, match="groups"):
        JLCM(groups=0)
    with pytest.raises(FormatError, match="multiple of groups=7"):
        JLCM(groups=7).quantize(w, None, parse_format("kmeans4-tensor"))
    with pytest.raises(FormatError, match="serves"):
        JLCM().quantize(w, None, parse_format("kmeans4-row"))
