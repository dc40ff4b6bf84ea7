"""QuantEase: codes that no single change improves, and outliers that stand apart."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import UsageError
from bitpress.formats import parse_format
from bitpress.formats.terms.sparse import Sparse
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.quantease import QuantEase, largest_eigenvalue, moved_outliers
from bitpress.quantizers.quantizer import output_error

OUT, IN = 8, 32


def case(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return torch.randn(OUT, IN, generator=generator), Stats(64, x.T @ x / 64)


def damped(stats: Stats, damp: float = 0.01) -> Stats:
    gram = stats.need_gram("test")
    return dataclasses.replace(stats, gram=gram + damp * gram.diagonal().mean() * torch.eye(IN))


@pytest.mark.parametrize("start", ["gptq", "weight"])
def test_no_single_code_can_be_improved(start: Any) -> None:
    w, stats = case()
    fmt = parse_format("int2-g16-zero")
    outcome = QuantEase(sweeps=40, relax_every=0, start=start).quantize(w, stats, fmt)
    codes, params = outcome.weight.terms[0].unpack()  # type: ignore[attr-defined]
    gram = damped(stats).need_gram("test").double()

    def errors(changed: torch.Tensor) -> torch.Tensor:
        difference = (w - fmt.decode(changed, params)).double()
        return torch.einsum("oi,ij,oj->o", difference, gram, difference)

    least = errors(codes)
    for column in range(IN):
        for code in range(4):
            changed = codes.clone()
            changed[:, column] = code
            assert (errors(changed) >= least * (1 - 1e-6)).all()


@pytest.mark.parametrize("name", ["int4-g16-zero", "int3-row", "nf3-g16"])
def test_it_does_no_worse_than_where_it_starts(name: str) -> None:
    w, stats = case(1)
    fmt = parse_format(name)
    ours = QuantEase().quantize(w, stats, fmt)
    theirs = GPTQ().quantize(w, stats, fmt).weight.dequantize()
    assert output_error(w, ours.weight.dequantize(), damped(stats)) < output_error(w, theirs, damped(stats))
    assert 0 < ours.figures["improved_rows"] <= 1


def test_relaxed_sweeps_are_every_third_and_never_the_last_two() -> None:
    assert [s for s in range(10) if QuantEase(sweeps=10).relaxed(s)] == [1, 4, 7]
    assert [s for s in range(6) if QuantEase(sweeps=6).relaxed(s)] == [1]
    assert not any(QuantEase(relax_every=0).relaxed(s) for s in range(10))


def test_outliers_begin_as_the_largest_weights_and_are_not_in_the_range() -> None:
    w, stats = case(2)
    w[3, 5], w[6, 20] = 40.0, -30.0
    fmt = parse_format("int3-row-zero")
    outcome = QuantEase(sweeps=1, outliers=2 / w.numel()).quantize(w, stats, fmt)
    packed, apart = outcome.weight.terms
    assert isinstance(apart, Sparse)
    expected = torch.zeros_like(w)
    expected[3, 5], expected[6, 20] = 40.0, -30.0
    assert torch.equal(apart.dequantize(), expected)
    assert float(packed.dequantize().abs().max()) < 5
    assert outcome.figures["outliers"] == 2 / w.numel()


def test_outliers_follow_the_gradient_and_lessen_the_error() -> None:
    w, stats = case(3)
    fmt = parse_format("int2-row-zero")
    count = 13
    errors = []
    for sweeps in (1, 12):
        outcome = QuantEase(sweeps=sweeps, outliers=count / w.numel(), relax_every=0).quantize(w, stats, fmt)
        errors.append(output_error(w, outcome.weight.dequantize(), damped(stats)))
        assert isinstance(outcome.weight.terms[1], Sparse)
    without = QuantEase(sweeps=12, relax_every=0).quantize(w, stats, fmt).weight.dequantize()
    assert errors[1] < errors[0]
    assert errors[1] < output_error(w, without, damped(stats))


def test_a_move_of_outliers_is_a_step_down_the_gradient() -> None:
    w, stats = case(4)
    gram = stats.need_gram("test")
    step = 1 / largest_eigenvalue(gram)
    apart, count, errors = torch.zeros_like(w), 20, []
    for _ in range(6):
        errors.append(float((((w - apart) @ gram) * (w - apart)).sum()))
        moved = apart + step * ((w - apart) @ gram)
        least = moved.abs().flatten().sort(descending=True).values[count - 1]
        expected = torch.where(moved.abs() >= least, moved, 0.0)
        apart = moved_outliers(apart, w, gram, step, count)
        torch.testing.assert_close(apart, expected, rtol=2**-10, atol=0.0)
    # A step of 1 / eigenvalue never climbs; halves round what it gained by little.
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_the_largest_eigenvalue() -> None:
    gram = case(5)[1].need_gram("test")
    assert largest_eigenvalue(gram) == pytest.approx(float(torch.linalg.eigvalsh(gram)[-1]), rel=1e-3)


@pytest.mark.parametrize(
    "settings", [{"sweeps": 0}, {"relax_every": 1}, {"start": "rtn"}, {"outliers": 0.6}, {"damp": 0.0}, {"clip": "none"}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QuantEase(**settings)
