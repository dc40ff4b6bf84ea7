"""BitStack: every term takes away from the error, magnitudes are the nearest of their rank, and inputs count as they are scaled."""

import itertools

import pytest
import torch

from bitpress.errors import FormatError, NumericsError
from bitpress.formats import CompressedWeight, parse_format
from bitpress.formats.bit_stack import bit_stack
from bitpress.formats.one_bit import one_bit
from bitpress.formats.terms.sign_low_rank import sign_low_rank


def weight(seed: int) -> torch.Tensor:
    """Outputs and inputs of different size, as in a network."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(128, 192, generator=generator)
    return w * (0.2 + torch.rand(192, generator=generator)) * (0.2 + torch.rand(128, 1, generator=generator))


def test_a_term_is_the_signs_and_the_nearest_magnitudes() -> None:
    w = weight(1)
    s = torch.linalg.svdvals(w.abs())
    for rank in (1, 16):
        left = float((sign_low_rank(w, rank).dequantize() - w).square().sum())
        # Rounding the factors to float16 adds 2^-11 of the product, squared, per factor.
        assert left == pytest.approx(float(s[rank:].square().sum()), rel=1e-4)


def test_rank_one_is_onebit() -> None:
    w = weight(2)
    a, b = sign_low_rank(w, 1).dequantize(), one_bit(w).dequantize()
    assert float((a - b).norm() / b.norm()) < 2e-3


def test_every_prefix_is_a_weight_and_each_term_takes_away() -> None:
    w = weight(3)
    stack = bit_stack(w, 6, rank=4)
    errors = [float((CompressedWeight(stack.terms[:n]).dequantize() - w).square().sum()) for n in range(1, 7)]
    # Measured 0.31, 0.37, 0.44, 0.52 and 0.60 from each term to the next: what is left is ever less of one sign pattern.
    assert all(after < 0.65 * before for before, after in itertools.pairwise(errors))
    fmt = parse_format("int2-row")
    params = fmt.fit(w, None, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    assert errors[1] < float((fmt.decode(fmt.encode(w, params), params) - w).square().sum())


def test_inputs_count_as_they_are_scaled() -> None:
    w = weight(4)
    scale = torch.rand(192, generator=torch.Generator().manual_seed(5)) ** 4 + 0.01
    plain, aware = bit_stack(w, 2, 4), bit_stack(w, 2, 4, scale)
    left = [float(((c.dequantize() - w) * scale).square().sum()) for c in (plain, aware)]
    assert left[1] < 0.9 * left[0]
    rebuilt = CompressedWeight.build(aware.spec(), aware.tensors())
    assert torch.equal(rebuilt.dequantize(), aware.dequantize())


def test_bits_are_what_is_stored() -> None:
    assert bit_stack(weight(6), 3, rank=2).nbytes == 3 * (128 * 192 // 8 + 2 * 2 * (128 + 192))


def test_what_cannot_be_stacked_is_refused() -> None:
    w = weight(7)
    with pytest.raises(FormatError, match="at least 1"):
        bit_stack(w, 0)
    with pytest.raises(FormatError, match="positive"):
        bit_stack(w, 1, scale=torch.zeros(192))
    w[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="NaN"):
        bit_stack(w, 1)
