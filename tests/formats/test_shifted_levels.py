"""Shifted levels: the published tables, and less error than other grids of their size."""

import pytest
import torch

from bitpress.calibration.stats import Stats
from bitpress.formats import find_row, parse_format
from bitpress.formats.grids.mixture import Mixture
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.rtn import shrink_ratios

# As ik_llama.cpp lists them: a table and the shifted one.
PUBLISHED = {
    "iq2k": ((-31, -13, 1, 17), (-26, -8, 6, 22)),
    "iq3k": ((-63, -40, -23, -10, 1, 13, 28, 47), (-59, -36, -19, -6, 5, 17, 32, 51)),
    "iq4k": (
        (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        (-123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117),
    ),
}


def weight(rows: int = 16, cols: int = 576) -> torch.Tensor:
    """Gaussian weights, times a Gaussian for each eighth of them: of the tails that models have."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, cols, generator=generator) * (1 + (torch.rand(rows, cols, generator=generator) < 1 / 8))


def relative(name: str) -> tuple[float, float]:
    """Return the stored bits of a weight and its relative squared error."""
    fmt, w = parse_format(name), weight()
    params = fmt.fit(w, shrink=shrink_ratios("mse", 20, 0.5))
    error = (fmt.decode(fmt.encode(w, params), params) - w).square().sum() / w.square().sum()
    return fmt.nbytes((576, 576)) * 8 / 576**2, float(error)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tables_are_the_published_ones_and_their_mirror_images(name: str) -> None:
    grid = find_row(name).grid
    assert isinstance(grid, Mixture)
    plain, shifted = PUBLISHED[name]
    expected = [plain, shifted, tuple(-level for level in plain), tuple(-level for level in shifted)]
    assert [table.levels for table in grid.tables] == expected


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("iq4k-g32-s4", "nf4-g32-s6"),
        ("iq4k-g32", "int4-g64-zero"),
        ("iq4k-g16-s4", "int4-g16-zero-s4"),
        ("iq3k-g32", "nf3-g32-s6"),
        ("iq3k-g16", "int3-g16-zero-s4"),
        ("iq2k-g32", "int2-g32-zero-s6"),
        ("iq2k-g16", "int2-g16-zero-s4"),
    ],
)
def test_less_error_than_other_grids_of_no_fewer_bits(name: str, peer: str) -> None:
    """At the width of a small model, 576, which blocks of 256 do not divide."""
    bits, error = relative(name)
    peer_bits, peer_error = relative(peer)
    assert bits <= peer_bits + 1e-9
    assert error < 0.95 * peer_error


def test_every_block_takes_one_of_four_tables() -> None:
    fmt, w = parse_format("iq3k-g16"), weight()
    params = fmt.fit(w)
    assert params["which"].unique().tolist() == [0, 1, 2, 3]
    # Weights turned over take the mirror image of the table.
    mirrored = fmt.fit(-w)
    assert torch.equal(mirrored["which"], (params["which"] + 2) % 4)
    assert torch.equal(mirrored["scale"], params["scale"])


def test_error_feedback_refits_shift_and_scale_group_by_group() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x = weight(), torch.randn(2048, 576, generator=generator) @ torch.randn(576, 576, generator=generator) / 24
    gram = x.T @ x / len(x)
    fmt = parse_format("iq3k-g16")
    rounded = fmt.fit(w, gram.diagonal(), shrink_ratios("mse", 20, 0.5))

    def error(w_hat: torch.Tensor) -> float:
        return float((((w_hat - w) @ gram) * (w_hat - w)).sum())

    found = GPTQ().quantize(w, Stats(len(x), gram), fmt).weight.dequantize()
    assert error(found) < 0.75 * error(fmt.decode(fmt.encode(w, rounded), rounded))
