"""PTQTP: ridge regression and the search over nine pairs, against the paper's steps done weight by weight."""

import itertools

import pytest
import torch

from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import Packed, parse_format
from bitpress.formats.grids.block_levels import SortedBlocks
from bitpress.quantizers.mechanisms.two_planes import by_block, pairs_of, ridge_scales, settle
from bitpress.quantizers.ptqtp import PTQTP

PAIRS = list(itertools.product((-1.0, 0.0, 1.0), repeat=2))


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) ** 3


def by_hand(v: torch.Tensor) -> float:
    """The squared error of one block that the paper's algorithm comes to, in float64."""
    v = v.double()
    pairs = torch.tensor(PAIRS, dtype=torch.float64)
    digits = torch.stack([v.sign(), v.sign()], 1)
    for _ in range(50):
        normal = digits.T @ digits
        values = torch.linalg.eigvalsh(normal)
        ridge = max(0.0, float((values[1] - 1e6 * values[0]) / (1e6 - 1)))
        scales = torch.linalg.solve(normal + ridge * torch.eye(2), digits.T @ v).abs()
        digits = pairs[(v[:, None] - pairs @ scales).square().argmin(1)]
    return float((v - digits @ scales).square().sum())


def test_the_way_from_the_signs_is_the_algorithm_of_the_paper() -> None:
    w, fmt = weight(), parse_format("trits2-g16-fp32")
    blocks = by_block(w, fmt)
    half = blocks.abs().mean(1, keepdim=True).expand(-1, 2) / 2
    _, error = settle(SortedBlocks.of(blocks), pairs_of(fmt), half, 50, 1e6)
    paper = torch.tensor([[by_hand(v)] for v in blocks], dtype=torch.float64)
    torch.testing.assert_close(error, paper, rtol=1e-4, atol=1e-5)
    ours = by_block(PTQTP().quantize(w, None, fmt).weight.dequantize(), fmt)
    assert bool(((ours - blocks).double().square().sum(1, keepdim=True) <= paper + 1e-5).all())


def regressed(blocks: torch.Tensor, codes: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Scales for given codes, by what `ridge_scales` is told of them."""
    chosen = torch.nn.functional.one_hot(codes, 9).double()
    return ridge_scales(chosen.sum(1), (chosen * blocks[..., None]).sum(1), pairs, 1e6)


def test_scales_are_those_of_ridge_regression() -> None:
    fmt = parse_format("trits2-g16")
    blocks, pairs = by_block(weight(1), fmt), pairs_of(fmt)
    codes = torch.randint(0, 9, (16, 16), generator=torch.Generator().manual_seed(2))
    for v, c, scale in zip(blocks, codes, regressed(blocks, codes, pairs), strict=True):
        best = torch.linalg.lstsq(pairs[c].double(), v[:, None].double()).solution[:, 0]
        torch.testing.assert_close(scale, best.abs().float(), rtol=1e-4, atol=1e-6)


def test_planes_of_equal_digits_share_their_scale() -> None:
    fmt = parse_format("trits2-row")
    blocks, pairs = by_block(weight(3), fmt), pairs_of(fmt)
    codes = torch.where(blocks < 0, 0, 8)
    # The ridge is 1e-6 of the normal equations here, and so is what it takes away.
    half = blocks.abs().mean(1, keepdim=True).expand(-1, 2) / 2
    torch.testing.assert_close(regressed(blocks, codes, pairs), half, rtol=1e-5, atol=0)
    assert not regressed(blocks, torch.full_like(codes, 4), pairs).any()


def test_every_weight_has_the_best_of_the_nine_pairs() -> None:
    w = weight(4)
    packed = PTQTP().quantize(w, None, parse_format("trits2-g16")).weight.terms[0]
    assert isinstance(packed, Packed)
    codes, params = packed.unpack()
    scale = params["scale"].repeat_interleave(16, 1)
    tried = torch.stack([(w - a * scale[..., 0] - b * scale[..., 1]).abs() for a, b in PAIRS])
    torch.testing.assert_close((w - packed.dequantize()).abs(), tried.min(0).values, rtol=0, atol=1e-6)
    digits = pairs_of(packed.format)[codes.long()]
    torch.testing.assert_close(packed.dequantize(), (digits * scale).sum(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", ["g16", "row", "2x8"])
def test_planes_can_be_two_terms(block: str) -> None:
    w = weight(5)
    both = PTQTP().quantize(w, None, parse_format(f"trits2-{block}")).weight
    apart = PTQTP().quantize(w, None, parse_format(f"ternary-{block}-base3")).weight
    assert len(apart.terms) == 2
    torch.testing.assert_close(apart.dequantize(), both.dequantize(), rtol=0, atol=1e-6)
    # 32 weights in 7 bytes a plane and row, where codes of 4 bits take 16 bytes for both planes.
    assert both.nbytes - apart.nbytes == 8 * (16 - 14)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="steps"):
        PTQTP(steps=0)
    with pytest.raises(UsageError, match="condition"):
        PTQTP(condition=1.0)
    with pytest.raises(FormatError, match=r"ptqtp serves trits2-\*, ternary-\*, not dual2-row"):
        PTQTP().quantize(weight(), None, parse_format("dual2-row"))
    with pytest.raises(NumericsError, match="NaN"):
        PTQTP().quantize(weight() * torch.inf, None, parse_format("trits2-row"))
