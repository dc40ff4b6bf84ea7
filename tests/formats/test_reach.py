"""Whether a format can hold a weight's size: what it says beside what comes back."""

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.formats import SCALES, SHORT, parse_format
from bitpress.formats.reach import changed_rows, lost_rows, widened
from bitpress.formats.terms.low_rank import low_rank

# One grid of every kind; those that search or cluster for seconds keep their scales as the others do.
GRIDS = (
    "int2",
    "int8",
    "bipolar3",
    "e2m1",
    "e4m3",
    "e5m2",
    "bfp4",
    "log4",
    "dint4",
    "nf4",
    "binary",
    "ternary",
    "gauss4x2",
    "e8p",
)
NAMES = [
    *(f"{grid}-g32" for grid in GRIDS),
    "int3-g32-zero",
    "kmeans2-row",
    *SHORT,
    *(f"int4-g32-{scale}" for scale in SCALES),
    "int4-8x32",
    "int4-tensor",
]


def weight() -> torch.Tensor:
    return torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) * 0.02


def relative_error(w: torch.Tensor, name: str) -> torch.Tensor:
    """Round plainly; give the squared error of every row beside its own square."""
    fmt = parse_format(name)
    params = fmt.fit(w)
    difference = (fmt.decode(fmt.encode(w, params), params) - w).double()
    return difference.square().sum(1) / w.double().square().sum(1)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**-20, 1.0, 2.0**30])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_any_size_comes_back_or_is_named(name: str, size: float) -> None:
    w = weight()
    lost = lost_rows(w * size, parse_format(name))
    if size == 1.0:
        assert not lost.any()
    try:
        errors = relative_error(w * size, name)
    except NumericsError:
        assert lost.all()
        return
    # A scale that is off by a sixteenth in float16 clips the largest weights by that much, or spaces levels that much wider.
    assert bool((errors <= 2 * relative_error(w, name) + 0.02)[~lost].all())


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-fp8", "nf4-g32-dq", "kmeans2-g32", "int4-4x32"])
def test_single_rows_are_seen(name: str) -> None:
    w = weight()
    w[4:8] *= 1e-8
    assert lost_rows(w, parse_format(name)).tolist() == [4 <= i < 8 for i in range(16)]


@pytest.mark.parametrize("name", ["int4-g32-s6", "int4-g32-p2row", "int4-g32-fp32", "int4-g32-bf16", "mxfp4", "int8-tensor"])
def test_rows_with_a_scale_of_their_own_or_none_are_kept(name: str) -> None:
    w = weight()
    w[4:8] *= 1e-8
    assert not lost_rows(w, parse_format(name)).any()


def test_what_has_decayed_is_no_loss() -> None:
    w = weight()
    w[3] *= 1e-30
    w[4] = 0.0
    assert not lost_rows(w, parse_format("int8-g32")).any()
    assert not lost_rows(torch.zeros(4, 64), parse_format("int8-g32")).any()


def test_wider_scales_hold_it() -> None:
    w = weight() * 1e-9
    for name in ("int4-g32", "nf4-g32-dq", "bfp4-g32", "nvfp4"):
        wide = widened(parse_format(name))
        assert wide is not None
        assert wide.scale == "fp32"
        assert not lost_rows(w, wide).any()
        assert widened(wide) is None
    assert widened(parse_format("kmeans2-g32")) is None


def test_rows_of_another_size_are_seen() -> None:
    w, fmt = weight(), parse_format("int4-g32")
    other = w.clone()
    other[2] = 0.0
    other[5] *= 5
    assert changed_rows(w, other, fmt).tolist() == [i in (2, 5) for i in range(16)]
    assert not changed_rows(w, w * 0.5, fmt).any()
    assert not changed_rows(w * 0, w * 0, fmt).any()


def test_small_factors_of_a_low_rank_term_are_kept_in_bf16() -> None:
    m = weight()[:, :64]
    for size, dtype in ((1.0, "fp16"), (1e-4, "fp16"), (1e-12, "bf16")):
        term = low_rank(m * size, 8)
        assert term.spec()["dtype"] == dtype
        nearest = low_rank(m, 8).dequantize()
        # bf16 holds 8 bits of each of two factors.
        assert float((term.dequantize() / size - nearest).norm()) < 2**-7 * float(nearest.norm())
