"""OliVe: the values of the public code, the bytes, the search against all bytes, and outliers that do not cost their block."""

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import parse_format
from bitpress.formats.grids.outlier_pair import FLINT4, INT4, INT8, OutlierPair, PairTable

GRID = OutlierPair("olive4", (INT4,))
FLINT = OutlierPair("olive4f", (FLINT4,))
BYTES = OutlierPair("olive8", (INT8,))
ONE = {"scale": torch.ones(1)}


def legal(grid: OutlierPair = GRID) -> torch.Tensor:
    codes = torch.arange(1 << grid.code_bits, dtype=torch.uint8 if grid.code_bits == 8 else torch.int32)
    return codes[~grid.decode(codes, ONE).view(-1, 2).isnan().any(-1)]


@pytest.mark.parametrize(
    ("table", "largest", "mantissa_bits"),
    [(INT4, 7 * 4, 1), (FLINT4, 16 * 2, 1), (INT8, 127 / 4, 5)],
    ids=["int4", "flint4", "int8"],
)
def test_outliers_are_the_published_ones(table: PairTable, largest: float, mantissa_bits: int) -> None:
    """The authors' generator: 2^i (1 + j / 2^m) for i = 5 .. 8, less the first, where the largest normal value is below or at 32."""
    steps = 1 << mantissa_bits
    published = [2**i * (1 + j / steps) for i in range(5, 9) for j in range(steps)][1:]
    assert [value * largest / table.normal[-1] for value in table.outlier] == published
    assert len(table.outlier) == len(table.normal) - 1 == (1 << (table.bits - 1)) - 1


def test_flint_is_the_published_one() -> None:
    # The authors' generator for 4 bits with a sign: 2^-2, 2^-1 (1 + j/2), 2^0 (1 + j/2), 2^1 and 2^2, in quarters.
    assert [value / 4 for value in FLINT4.normal] == [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4]
    assert {abs(level) for level in parse_format("flint4-row").grid.levels} == set(FLINT4.normal)  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("grid", [GRID, FLINT, BYTES], ids=lambda grid: grid.name)
@pytest.mark.parametrize("spread", [2.0, 8.0, 60.0])
def test_the_nearest_pair_of_all_is_found(spread: float, grid: OutlierPair) -> None:
    generator, count = torch.Generator().manual_seed(1), 2000 if grid.code_bits == 8 else 300
    pairs = torch.randn(count, 2, generator=generator) * torch.exp(torch.randn(count, 2, generator=generator)) * spread
    pairs *= 1 if grid.code_bits == 8 else 16
    found = (grid.decode(grid.encode(pairs, ONE), ONE).view(-1, 2) - pairs).norm(dim=-1)
    nearest = torch.cdist(pairs.double(), grid.decode(legal(grid), ONE).view(-1, 2).double()).min(-1).values
    torch.testing.assert_close(found.double(), nearest, rtol=1e-5, atol=1e-5)


def tailed(block: int = 256) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.distributions.StudentT(torch.tensor(4.0)).sample((64, block))


def relative(name: str, w: torch.Tensor) -> torch.Tensor:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return (fmt.decode(fmt.encode(w, params), params) - w).square().sum(-1)


def test_flint_has_less_error_under_heavy_tails_and_a_block_takes_the_better_one() -> None:
    w = tailed()
    integer, flint, chosen = (relative(f"olive4{kind}-row-fp32", w) for kind in ("", "f", "a"))
    assert flint.sum() < 0.98 * integer.sum()
    torch.testing.assert_close(chosen, torch.minimum(integer, flint))
    which = parse_format("olive4a-row").fit(w)["which"]
    assert set(which.unique().tolist()) == {0, 1}
    assert parse_format("olive4a-row").nbytes((64, 256)) == 64 * (128 + 2 + 1)


def test_8_bits_lose_little_to_outliers() -> None:
    w = tailed()
    w[::2, 5] *= 40
    # What is left is the victims.
    assert relative("olive8-row", w).sum() * 2 < relative("int8-row", w).sum()
    assert parse_format("olive8-row").nbytes((64, 256)) == 64 * (256 + 2)


@pytest.mark.parametrize("code", [0xFFFF, 0xFF7F, 0x7FFF])
def test_a_victim_of_8_bits_needs_its_outlier(code: int) -> None:
    with pytest.raises(FormatError, match="victim"):
        BYTES.check(torch.tensor([code], dtype=torch.int32))
    assert len(legal(BYTES)) == BYTES.num_codes == 65533


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
