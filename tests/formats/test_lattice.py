"""QuIP#'s codebooks: the published codewords under the published codes, the search against all of them, the published scales."""

import itertools
import math

import pytest
import torch

from bitpress.formats import CompressedWeight, Packed, parse_format
from bitpress.formats.grids.lattice import E8P, E81B, Lattice

CPU = torch.device("cpu")
# Codes and codewords of the authors' code, in quarters: both shifts, even and odd sums, rows of norm 12 from the first to the last.
PUBLISHED = {
    0x0000: (3, 3, 3, 3, 3, 3, 3, 3),
    0x0001: (1, 1, 1, 1, 1, 1, 1, 1),
    0x0080: (-3, 1, 1, 1, 1, 1, 1, -3),
    0x00FF: (-1, -1, -1, -1, -1, -1, -1, -1),
    0x1234: (-3, -3, 1, -3, -7, 1, 1, 5),
    0x5A3C: (3, -1, 11, -1, -1, 7, -1, -1),
    0xABCD: (5, 1, 1, 5, -3, -7, -3, 1),
    0xE2FF: (-9, -5, -1, -1, -1, -1, -1, 3),
    0xE300: (7, 3, 3, 3, 7, 7, 7, -5),
    0xE3A7: (5, 1, -3, -3, -7, 5, 5, 5),
    0xFF10: (-7, -7, 1, 1, 5, 5, 5, -3),
    0xFFFF: (-5, -5, -1, -1, -5, -5, -5, 3),
}


def gaussian(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def squared_error(lattice: Lattice, vectors: torch.Tensor, rms: float) -> float:
    """The error per weight of Gaussian vectors brought to this root mean square."""
    scale = {"scale": torch.tensor(1 / rms)}
    return float((lattice.decode(lattice.encode(vectors, scale), scale) - vectors).square().mean())


def test_e8p_has_the_published_patterns() -> None:
    words = E8P.codewords(CPU)
    assert len(words.unique(dim=0)) == 65536
    codes = torch.arange(65536)
    bits = sum((codes >> i) & 1 for i in range(8))
    unshifted = torch.where((bits % 2 == 1)[:, None], words + 0.25, words - 0.25)
    # Half-integers of even sum: the points of D8 + 1/2, so all of E8 + 1/4 and E8 - 1/4.
    assert torch.all(unshifted.sum(-1) % 2 == 0)
    assert torch.all((2 * unshifted) % 2 == 1)
    magnitudes = unshifted.abs()[::256]
    norms = magnitudes.square().sum(-1)
    assert (int((norms <= 10).sum()), int((norms == 12).sum())) == (227, 29)
    # The 227 are all there are: the magnitudes of a point of squared norm 10 at most.
    count = sum(sum(m * m for m in p) <= 10 for p in itertools.product((0.5, 1.5, 2.5, 3.5), repeat=8))
    assert count == 227
    assert torch.equal(unshifted.abs().view(256, 256, 8), magnitudes[:, None].expand(256, 256, 8))


@pytest.mark.parametrize("code", PUBLISHED)
def test_e8p_codes_are_the_published_ones(code: int) -> None:
    one = {"scale": torch.ones(1)}
    word = torch.tensor(PUBLISHED[code]) / 4
    assert torch.equal(E8P.decode(torch.tensor([code], dtype=torch.int32), one), word)
    assert E8P.encode(word, one).tolist() == [code]


def test_every_e8p_code_is_found_again() -> None:
    codes = torch.arange(65536, dtype=torch.int32)
    one = {"scale": torch.ones(1)}
    assert torch.equal(E8P.encode(E8P.decode(codes, one), one), codes)


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_e8p_finds_the_nearest_of_all(spread: float) -> None:
    vectors, words = gaussian(200, 1) * spread, E8P.codewords(CPU)
    one = {"scale": torch.ones(1)}
    found = (E8P.decode(E8P.encode(vectors, one), one) - vectors).square().sum(-1)
    nearest = torch.cdist(vectors.double(), words.double()).min(-1).values.square()
    torch.testing.assert_close(found.double(), nearest, rtol=1e-5, atol=1e-5)


def test_e81b_is_the_center_of_e8() -> None:
    words = E81B.codewords(CPU)
    assert len(words.unique(dim=0)) == 256
    norms = words.square().sum(-1)
    # 240 is the kissing number of E8.
    assert [int((norms == n).sum()) for n in (0, 2, 4)] == [1, 240, 15]
    assert torch.all((words.sum(-1) % 2 == 0) & (((2 * words) % 2).sum(-1) % 8 == 0))


def test_the_error_of_a_gaussian_lies_between_the_best_scalar_and_the_bound() -> None:
    vectors = gaussian(20_000, 2)
    # Lloyd-Max with 4 and 2 levels: 0.1175 and 1 - 2/pi; no code at all does better than 2^(-2 bits).
    two, one = squared_error(E8P, vectors, E8P.rms), squared_error(E81B, vectors, E81B.rms)
    assert 2**-4 < two < 0.1175
    assert 2**-2 < one < 1 - 2 / math.pi
    assert two == pytest.approx(0.0913, rel=0.02)
    assert one == pytest.approx(0.318, rel=0.02)


@pytest.mark.parametrize("lattice", [E8P, E81B])
def test_the_scale_is_the_best_for_a_gaussian(lattice: Lattice) -> None:
    vectors = gaussian(10_000, 3)
    here = squared_error(lattice, vectors, lattice.rms)
    assert here < squared_error(lattice, vectors, lattice.rms * 0.9)
    assert here < squared_error(lattice, vectors, lattice.rms * 1.1)
    fitted = lattice.fit(vectors.view(-1, 80) * 1e-25)["scale"]
    torch.testing.assert_close(fitted.mean().item() * lattice.rms, 1e-25, rtol=0.02, atol=0)


@pytest.mark.parametrize(("second", "bits", "error"), [("e81b", 3, 0.030), ("e8p", 4, 0.0096)])
def test_two_terms_are_three_and_four_bits(second: str, bits: int, error: float) -> None:
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(4))
    left, terms = w, []
    for name in ("e8p", second):
        fmt = parse_format(f"{name}-row")
        params = fmt.fit(left)
        terms.append(Packed.pack(fmt, fmt.encode(left, params), params))
        left = left - terms[-1].dequantize()
    whole = CompressedWeight(tuple(terms))
    assert whole.bits_per_weight == bits + 2 * 16 / 1024
    # Less than the best scalar quantizer's at 3 bits, 0.0345, and about its at 4 bits, 0.0095.
    assert float((whole.dequantize() - w).square().mean()) == pytest.approx(error, rel=0.04)
