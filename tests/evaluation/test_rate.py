"""Rates against what is known: the bound, published quantizers of a Gaussian, bytes counted by hand."""

import math

import pytest
import torch

from bitpress.errors import NumericsError
from bitpress.evaluation.rate import DB_PER_BIT, SOURCES, Rate, draw_source, measure_rates
from bitpress.formats import GRIDS, Levels, Row, parse_format
from bitpress.quantizers.rtn import shrink_ratios

CLIPS = {"minmax": (1.0,), "mse": shrink_ratios("mse", 20, 0.5)}


def measure(names: list[str], matrices: dict[str, torch.Tensor]) -> tuple[dict[tuple[str, str], Rate], dict[str, str]]:
    rows, refused = measure_rates(matrices.items(), [parse_format(name) for name in names], CLIPS)
    return {(row.format, row.clip): row for row in rows}, refused


# Moments of the sources: the mean of |x| over the root of the mean of x^2, and the fourth moment over the squared second one.
@pytest.mark.parametrize(
    ("source", "mean_to_rms", "kurtosis"),
    [("gaussian", math.sqrt(2 / math.pi), 3.0), ("laplace", math.sqrt(0.5), 6.0), ("student5", 0.735105, None)],
)
def test_sources_have_the_moments_of_their_distributions(source: str, mean_to_rms: float, kurtosis: float | None) -> None:
    x = draw_source(source, (512, 1024)).double()
    rms = float(x.square().mean().sqrt())
    assert abs(float(x.mean())) < 0.01 * rms
    assert float(x.abs().mean()) / rms == pytest.approx(mean_to_rms, rel=0.01)
    if kurtosis is not None:  # that of t with 5 degrees, 9, converges too slowly to be compared
        assert float(x.pow(4).mean()) / rms**4 == pytest.approx(kurtosis, rel=0.03)
    assert torch.equal(draw_source(source, (4, 8)), draw_source(source, (4, 8))), "the seed is fixed"


def test_the_sign_of_a_gaussian_loses_what_theory_says() -> None:
    # Max 1960: one bit leaves 1 - 2/pi of the variance. One scale for 524,288 weights costs nothing that shows.
    rows, _ = measure(["binary-tensor"], {"g": draw_source("gaussian", (512, 1024))})
    row = rows["binary-tensor", "minmax"]
    assert row.error == pytest.approx(1 - 2 / math.pi, rel=0.01)
    assert row.bits_per_weight == pytest.approx(1 + 16 / (512 * 1024))
    assert row.gap_db == pytest.approx(DB_PER_BIT * row.bits_per_weight + 10 * math.log10(row.error))


def test_many_even_levels_lose_the_twelfth_of_a_squared_step() -> None:
    # A tensor-wide scale that ends at the extreme of the sample: error = step^2 / 12 once steps are small beside the spread.
    x = draw_source("gaussian", (512, 1024))
    rows, _ = measure(["int8-tensor-fp32"], {"g": x})
    step = max(float(x.max()) / 127, -float(x.min()) / 128)
    assert rows["int8-tensor-fp32", "minmax"].error == pytest.approx(step**2 / 12 / float(x.double().square().mean()), rel=0.01)


def test_no_format_beats_the_bound_on_independent_gaussian_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Max 1960 again: the best four levels, which nothing of two bits and span 1 undercuts.
    best = (-1.510, -0.4528, 0.4528, 1.510)
    monkeypatch.setitem(GRIDS, "max2", Row(Levels("max2", best, "rms"), "the best four levels for a Gaussian"))
    names = ["max2-tensor", "int2-g64", "int4-g64-zero", "nf4-g64", "mxfp4", "nvfp4", "ternary-g64-base3"]
    rows, _ = measure(names, {"g": draw_source("gaussian", (512, 1024))})
    assert rows["max2-tensor", "mse"].error == pytest.approx(0.1175, rel=0.01)
    for row in rows.values():
        assert row.gap_db > 0, row
    for name in names:
        fmt = parse_format(name).name
        assert rows[fmt, "mse"].error <= rows[fmt, "minmax"].error * (1 + 1e-6)


def test_errors_and_bytes_add_up_over_matrices() -> None:
    a, b = draw_source("gaussian", (8, 64), 1), draw_source("laplace", (16, 128), 2) * 5
    fmt = parse_format("int3-g32-zero")
    rows, _ = measure([fmt.name], {"a": a, "b": b})
    lost = sum(float((fmt.decode(fmt.encode(w, p), p) - w).double().square().sum()) for w in (a, b) for p in (fmt.fit(w),))
    row = rows[fmt.name, "minmax"]
    assert row.error == pytest.approx(lost / float(a.double().square().sum() + b.double().square().sum()), rel=1e-12)
    # 3 bits a weight, and for every 32 of them an fp16 scale and a zero of 3 bits, packed by rows: 2 and 4 zeros in 1 and 2 bytes.
    assert row.nbytes == (8 * 64 + 16 * 128) * 3 // 8 + (8 * 2 + 16 * 4) * 2 + 8 * 1 + 16 * 2
    assert (row.weights, row.matrices, row.skipped) == (a.numel() + b.numel(), 2, 0)


def test_shapes_that_do_not_fit_are_counted_and_said() -> None:
    rows, refused = measure(["int4-g64", "int4-g48"], {"a": torch.randn(4, 64), "b": torch.randn(4, 96)})
    assert (rows["int4-g64", "minmax"].matrices, rows["int4-g64", "minmax"].skipped) == (1, 1)
    assert rows["int4-g48", "minmax"].weights == 4 * 96
    assert "a: in_features=64 is not a multiple of 48" in refused["int4-g48"]
    rows, refused = measure(["int4-g7"], {"a": torch.randn(4, 64)})
    assert not rows
    assert list(refused) == ["int4-g7"]


def test_a_scale_out_of_range_is_a_reason_too() -> None:
    rows, refused = measure(["int2-row", "int2-row-fp32"], {"large": torch.full((2, 64), 1e6)})
    assert {name for name, _ in rows} == {"int2-row-fp32"}
    assert "beyond the range of fp16" in refused["int2-row"]
    with pytest.raises(NumericsError):
        parse_format("int2-row").fit(torch.full((2, 64), 1e6))


def test_what_loses_nothing_has_no_ratio() -> None:
    w = torch.arange(-8.0, 8.0).repeat(4, 4)
    rows, _ = measure(["int4-g16"], {"w": w})
    row = rows["int4-g16", "minmax"]
    assert (row.error, row.snr_db) == (0.0, math.inf)
    assert row.as_dict()["snr_db"] is None
    assert row.as_dict()["gap_db"] is None


def test_a_grid_that_learns_its_levels_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = [name for name, row in GRIDS.items() if any(p.kind == "value" for p in row.grid.params)]
    rows, _ = measure([f"{name}-row" for name in learning] + ["int4-row"], {"w": draw_source("gaussian", (2, 256))})
    assert {clip for name, clip in rows if name != "int4-row"} <= {"minmax"}
    assert ("int4-row", "mse") in rows


def test_every_source_has_a_name() -> None:
    assert len({float(draw_source(source, (1, 2))[0, 0]) for source in SOURCES}) == len(SOURCES)
