"""OneBit: against the singular value decomposition, and against signs with a scale a row."""

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.formats import CompressedWeight, parse_format
from bitpress.formats.one_bit import one_bit


def weight(seed: int) -> torch.Tensor:
    """Outputs and inputs of different size, as in a network."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(96, 160, generator=generator)
    return w * torch.rand(160, generator=generator) * (0.2 + torch.rand(96, 1, generator=generator))


def test_the_error_is_that_of_the_first_singular_vectors() -> None:
    w = weight(1)
    u, s, v = torch.linalg.svd(w.abs().double())
    best = float((w.abs() - s[0] * torch.outer(u[:, 0], v[0])).square().sum())
    found = float((one_bit(w).dequantize() - w).double().square().sum())
    assert found == pytest.approx(best, rel=1e-5)


def test_it_beats_a_scale_a_row() -> None:
    w, fmt = weight(2), parse_format("binary-row")
    params = fmt.fit(w)
    plain = float((fmt.decode(fmt.encode(w, params), params) - w).square().sum())
    assert float((one_bit(w).dequantize() - w).square().sum()) < 0.75 * plain


def test_a_sign_matrix_between_factors_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    out, inner = torch.rand(24, generator=generator) + 0.1, torch.rand(40, generator=generator) + 0.1
    w = torch.outer(out, inner) * torch.randn(24, 40, generator=generator).sign()
    torch.testing.assert_close(one_bit(w).dequantize(), w, rtol=1e-5, atol=0)


def test_rows_and_columns_of_zeros_stay_zeros() -> None:
    w = weight(4)
    w[5], w[:, 7] = 0.0, 0.0
    found = one_bit(w).dequantize()
    assert not found[5].any()
    assert not found[:, 7].any()
    assert found.count_nonzero() == 95 * 159
    assert not one_bit(torch.zeros(4, 8)).dequantize().any()


@pytest.mark.parametrize("per_weight", [False, True])
def test_importance_moves_the_factors(per_weight: bool) -> None:
    w = weight(5) ** 3
    importance = torch.rand(96 if per_weight else 1, 160, generator=torch.Generator().manual_seed(6)) ** 8
    plain, aware = ((c.dequantize() - w).square().mul(importance).sum() for c in (one_bit(w), one_bit(w, importance)))
    assert float(aware) < 0.98 * float(plain)


def test_bits_are_what_is_stored() -> None:
    compressed = one_bit(weight(7))
    # A bit a weight, one float16 for the signs, a float32 for every output and every input.
    assert compressed.nbytes == 96 * 160 // 8 + 2 + 4 * (96 + 160)
    rebuilt = CompressedWeight.build(compressed.spec(), compressed.tensors())
    assert torch.equal(rebuilt.dequantize(), compressed.dequantize())


def test_what_is_not_finite_is_refused() -> None:
    w = weight(8)
    w[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        one_bit(w)
