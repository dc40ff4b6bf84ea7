"""YAQA against its update rule written down plainly, and by the curvature that it rounds under."""

import dataclasses

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import CalibrationError, FormatError, UsageError
from bitpress.formats import Params, parse_format
from bitpress.formats.format import Format
from bitpress.formats.maps.rotations import Hadamard
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.ldlq import LDLQ
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.yaqa import YAQA, curvature_error
from bitpress.transforms.basis import into_basis

OUT, IN = 24, 32


def gram(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.rand(size, generator=generator)
    x = torch.randn(400, size, generator=generator) @ mix
    return x.T @ x / 400


def case(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    return w, Stats(400, gram(IN, seed + 20), output_gram=gram(OUT, seed + 10))


def upper_unit(h: torch.Tensor, damp: float) -> torch.Tensor:
    """Return I + U of h + damping = (I + U) D (I + U)', U strictly upper triangular."""
    h = (h + damp * h.diagonal().mean() * torch.eye(len(h))).double()
    root = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return root / root.diagonal()


def by_the_rule(w: torch.Tensor, stats: Stats, fmt: Format, params: Params, damp: float) -> torch.Tensor:
    """Round one weight after the other by the update of the docstring, in natural order."""
    of_rows = upper_unit(stats.need("output_gram", "test"), damp)
    of_columns = upper_unit(stats.need_gram("test"), damp)
    errors, w_hat = torch.zeros(OUT, IN, dtype=torch.float64), torch.zeros(OUT, IN)
    for i in range(OUT):
        for j in range(IN):
            target = w[i, j] + (of_rows.T @ errors @ of_columns - errors)[i, j]
            at = {name: value[i] for name, value in fmt.columns(params, (OUT, IN), j).items()}
            w_hat[i, j] = fmt.grid.decode(fmt.grid.encode(target.float()[None], at), at).item()
            errors[i, j] = w[i, j].double() - w_hat[i, j].double()
    return w_hat


def test_one_row_at_a_time_is_the_update_rule() -> None:
    w, stats = case()
    fmt = parse_format("int3-g16-zero")
    got = YAQA(rows=1, order="natural", clip="minmax").quantize(w, stats, fmt).weight.dequantize()
    expected = by_the_rule(w, stats, fmt, fmt.fit(w), 0.01)
    # A value that lies between two levels to the last digit may go either way, and moves what comes after it; none does here.
    assert (got - expected).abs().gt(1e-5).sum() == 0
    one_sided = GPTQ(order="natural", clip="minmax").quantize(w, stats, fmt).weight.dequantize()
    assert (one_sided - expected).abs().gt(1e-5).sum() > OUT, "the rule of one side is another"


@pytest.mark.parametrize(
    "fmt", ["int4-g16-zero", "int3-g16-zero", "int2-row-zero", "nf4-g16", "gauss4x2-row", "e8p-row", "int4-2x16-zero"]
)
def test_less_curvature_than_by_columns_alone(fmt: str) -> None:
    totals = dict.fromkeys(("one row", "four rows", "columns", "rounded"), 0.0)
    parsed = parse_format(fmt)
    for seed in range(4):
        w, stats = case(seed)
        made = {
            "one row": YAQA(rows=1).quantize(w, stats, parsed),
            "four rows": YAQA(rows=4).quantize(w, stats, parsed),
            "columns": LDLQ(order="activation").quantize(w, stats, parsed),
            "rounded": RTN().quantize(w, None, parsed),
        }
        for name, outcome in made.items():
            totals[name] += curvature_error(w, outcome.weight.dequantize(), stats)
    assert totals["one row"] < 0.8 * totals["columns"] < 0.8 * totals["rounded"]
    assert totals["one row"] < totals["four rows"] < 0.95 * totals["columns"]


def test_it_is_the_loss_of_the_kronecker_product() -> None:
    w, stats = case()
    w_hat = RTN().quantize(w, None, parse_format("int3-g16-zero")).weight.dequantize()
    hessian = torch.kron(stats.need("output_gram", "test").double(), stats.need_gram("test").double())
    found, whole = (d.double().flatten() for d in (w - w_hat, w))
    assert curvature_error(w, w_hat, stats) == pytest.approx(
        float(found @ hessian @ found / (whole @ hessian @ whole)), rel=1e-4
    )


def test_the_loss_is_the_same_in_another_basis() -> None:
    w, stats = case()
    w_hat = RTN().quantize(w, None, parse_format("int3-g16-zero")).weight.dequantize()
    maps = tuple(Hadamard.random(size, 8, torch.Generator().manual_seed(size)) for size in (IN, OUT))
    turned = curvature_error(into_basis(w, maps), into_basis(w_hat, maps), stats.mapped(*maps))
    # Rotations in float32.
    assert turned == pytest.approx(curvature_error(w, w_hat, stats), rel=1e-4)
    assert turned != pytest.approx(curvature_error(into_basis(w, maps), into_basis(w_hat, maps), stats), rel=1e-2)


def test_without_an_output_gram_it_is_gptq_and_says_so() -> None:
    w, stats = case()
    fmt = parse_format("int3-g16-zero")
    alone = dataclasses.replace(stats, output_gram=None)
    outcome = YAQA().quantize(w, alone, fmt)
    assert "without feedback across rows" in outcome.fallbacks[0]
    assert torch.equal(outcome.weight.dequantize(), GPTQ().quantize(w, alone, fmt).weight.dequantize())


def test_a_sick_output_gram_is_named_and_survived() -> None:
    w, stats = case()
    fmt = parse_format("int4-g16")
    by_output = stats.need("output_gram", "test")
    hopeless = dataclasses.replace(stats, output_gram=-torch.ones(OUT, OUT) * 1e3 + 1001 * torch.eye(OUT))
    outcome = YAQA(damp_limit=1.0).quantize(w, hopeless, fmt)
    assert any("no feedback across rows" in text for text in outcome.fallbacks)
    alive = (torch.arange(OUT) % 3 != 0).float()
    for sick in (by_output * alive * alive[:, None], torch.outer(by_output[0], by_output[0]), by_output * 1e-30):
        ill = dataclasses.replace(stats, output_gram=sick)
        w_hat = YAQA().quantize(w, ill, fmt).weight.dequantize()
        assert torch.isfinite(w_hat).all()
        # No direction that the statistics say nothing of may run away: damping gives it a cost, and that is no larger than by rounding.
        eye, mean = torch.eye(OUT), sick.diagonal().mean()
        damped = dataclasses.replace(ill, gram=stats.need_gram("test"), output_gram=sick / mean + 0.01 * eye)
        plain = RTN().quantize(w, None, fmt).weight.dequantize()
        assert curvature_error(w, w_hat, damped) < curvature_error(w, plain, damped)


def test_what_it_refuses() -> None:
    w, stats = case()
    with pytest.raises(FormatError, match=r"serves \*, not tcq\*"):
        YAQA().quantize(w, stats, parse_format("tcq2-row"))
    with pytest.raises(UsageError, match="rows=0"):
        YAQA(rows=0)
    with pytest.raises(CalibrationError, match="8 rows for a weight of 24"):
        YAQA().quantize(w, dataclasses.replace(stats, output_gram=gram(8, 1)), parse_format("int4-g16"))
