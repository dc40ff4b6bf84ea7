"""OliVe: the values of the public code, the bytes, the search against all bytes, and outliers that do not cost their block."""

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import parse_format
from bitpress.formats.grids.outlier_pair import OUTLIERS, OutlierPair

GRID = OutlierPair()
ONE = {"scale": torch.ones(1)}


def legal() -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[~GRID.decode(codes, ONE).view(-1, 2).isnan().any(-1)]


def test_outliers_are_the_published_ones() -> None:
    # The authors' generator: 2^i (1 + j/2) for i = 5 .. 8, less the first, in quarters of a normal step.
    published = [2**i * (1 + j / 2) / 4 for i in range(5, 9) for j in (0, 1)][1:]
    assert list(OUTLIERS) == published == [12, 16, 24, 32, 48, 64, 96]


@pytest.mark.parametrize(
    ("byte", "pair"),
    [(0x77, (0, 0)), (0x0E, (7, -7)), (0xF8, (12, 0)), (0xF0, (-96, 0)), (0xEF, (0, 96)), (0x6F, (0, -12)), (0xAF, (0, 24))],
)
def test_bytes_are_as_documented(byte: int, pair: tuple[float, float]) -> None:
    assert GRID.decode(torch.tensor([byte], dtype=torch.uint8), ONE).tolist() == list(pair)
    assert GRID.encode(torch.tensor(pair).float(), ONE).tolist() == [byte]


def test_three_bytes_stand_for_nothing() -> None:
    codes = legal()
    assert len(codes) == GRID.num_codes == 253
    assert torch.equal(GRID.encode(GRID.decode(codes, ONE), ONE), codes)
    GRID.check(codes)
    for byte in (0xFF, 0xF7, 0x7F):
        with pytest.raises(FormatError, match="victim"):
            GRID.check(torch.tensor([byte], dtype=torch.uint8))


@pytest.mark.parametrize("spread", [2.0, 8.0, 60.0])
def test_the_nearest_pair_of_all_is_found(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(2000, 2, generator=generator) * torch.exp(torch.randn(2000, 2, generator=generator)) * spread
    found = (GRID.decode(GRID.encode(pairs, ONE), ONE).view(-1, 2) - pairs).norm(dim=-1)
    nearest = torch.cdist(pairs.double(), GRID.decode(legal(), ONE).view(-1, 2).double()).min(-1).values
    torch.testing.assert_close(found.double(), nearest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("block", "gain"), [(16, 1.8), (64, 4), (256, 9)])
def test_outliers_do_not_cost_their_block(block: int, gain: float) -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(256, 512, generator=generator)
    w[torch.rand(w.shape, generator=generator) < 0.003] *= 15
    errors = {}
    for name in ("olive4", "int4"):
        fmt = parse_format(f"{name}-g{block}")
        params = fmt.fit(w)
        errors[name] = float((fmt.decode(fmt.encode(w, params), params) - w).square().mean())
        assert fmt.nbytes((256, 512)) == 256 * 512 // 2 + 2 * 256 * 512 // block
    assert errors["olive4"] * gain < errors["int4"]


@pytest.mark.parametrize("block", [16, 64, 256])
def test_few_scales_are_nearly_as_good_as_many(block: int) -> None:
    w = torch.distributions.StudentT(torch.tensor(5.0))
    torch.manual_seed(3)
    blocks = w.sample((128, block))
    top = blocks.abs().amax(-1, keepdim=True)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (GRID.decode(GRID.encode(blocks, {"scale": scale}), {"scale": scale}) - blocks).square().sum(-1)

    many = torch.stack([error(top * ratio) for ratio in torch.logspace(-2.1, -0.4, 100)]).amin(0)
    assert error(GRID.fit(blocks)["scale"]).sum() < 1.06 * many.sum()
