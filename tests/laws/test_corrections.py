"""Laws of corrections, over every row of the table."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bitpress.calibration import STATISTICS, Stats
from bitpress.corrections.table import CORRECTIONS
from bitpress.errors import BitpressError, NumericsError
from bitpress.formats import CompressedWeight, Term, parse_format
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Named

FMT = parse_format("int3-g16-zero")


def case(seed: int = 0, out: int = 48, inner: int = 64) -> tuple[torch.Tensor, Stats]:
    """A weight with a few large entries, and an input with channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.rand(inner, generator=generator).pow(2)
    x = torch.randn(400, inner, generator=generator) @ mix
    w = torch.randn(out, inner, generator=generator)
    return w * (1 + 5 * (torch.rand(out, inner, generator=generator) < 0.02)), Stats(400, x.T @ x / 400, x.abs().mean(0))


def settings(name: str) -> Mapping[str, Any]:
    """Enough rank, or enough weights, to show in a small weight."""
    return {"rank": 8} if name in ("lorc", "lqer", "qera", "loftq", "lq-lora", "svdquant") else {"share": 0.02}


def terms_of(name: str, w: torch.Tensor, stats: Stats | None, **changes: Any) -> list[Term]:
    correction = CORRECTIONS[name](**(settings(name) | changes))
    rounded = RTN().quantize(w, None, FMT).weight
    return [t for t in (correction.split(w, stats, FMT), correction.repair(w, rounded, stats)) if t is not None]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_it_splits_or_repairs_a_term_of_the_weights_shape(name: str) -> None:
    w, stats = case()
    terms = terms_of(name, w, stats)
    assert terms
    assert all(term.shape == (48, 64) for term in terms)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rounding_with_it_is_nearer_to_the_weight(name: str) -> None:
    w, stats = case()
    alone = compress_matrix(w, stats, LayerMethod(FMT, Named("quantizer", "", RTN()))).weight.dequantize()
    ours = compress_matrix(
        w, stats, LayerMethod(FMT, Named("quantizer", "", RTN()), corrections=tuple([CORRECTIONS[name](**settings(name))]))
    ).weight.dequantize()
    assert (w - ours).norm() < (w - alone).norm()


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_bytes_are_those_that_were_planned(name: str, parts: int) -> None:
    w, stats = case()
    made = [CompressedWeight(tuple(terms_of(name, w, stats))) for _ in range(parts)]
    stacked = CompressedWeight.stack_rows(made) if parts > 1 else made[0]
    assert CORRECTIONS[name](**settings(name)).nbytes((48, 64), parts) == stacked.nbytes


@pytest.mark.parametrize("name", [n for n in CORRECTIONS if "rank" in settings(n)])
def test_a_rank_that_the_weight_does_not_have_is_refused_before_work(name: str) -> None:
    with pytest.raises(BitpressError, match=r"rank 49 is more than weights \[48, 64\] have; use 48 at most"):
        CORRECTIONS[name](rank=49).nbytes((48, 64))
    assert CORRECTIONS[name](rank=48).nbytes((48, 64)) == 2 * 48 * (48 + 64)
    assert CORRECTIONS[name](rank=8, dtype="int8-row").nbytes((48, 64)) == 8 * (48 + 64) + 2 * (48 + 8)
    with pytest.raises(BitpressError):
        CORRECTIONS[name](rank=8, dtype="int8-g128").nbytes((48, 64))
    for wrong in ({"rank": 0}, {"dtype": "int9000-row"}):
        with pytest.raises(BitpressError):
            CORRECTIONS[name](**wrong)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_same_input_gives_the_same_bytes_and_is_left_alone(name: str) -> None:
    w, stats = case(1)
    before = w.clone()
    first, second = (CompressedWeight(tuple(terms_of(name, w, stats))).tensors() for _ in range(2))
    assert all(torch.equal(value, second[leaf]) for leaf, value in first.items())
    assert torch.equal(w, before)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rows_in_another_order_give_their_terms_in_that_order(name: str) -> None:
    w, stats = case(2)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    plain = sum(t.dequantize() for t in terms_of(name, w, stats))
    permuted = sum(t.dequantize() for t in terms_of(name, w[order], stats))
    # Factors are rounded to fp16: 2^-11 of an entry, summed over 8 components.
    torch.testing.assert_close(permuted, plain[order], rtol=0, atol=float(plain.abs().max()) * 8 * 2**-11)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_without_statistics_the_terms_are_of_the_same_kinds(name: str) -> None:
    w, stats = case(3)
    assert [type(t) for t in terms_of(name, w, None)] == [type(t) for t in terms_of(name, w, stats)]


@pytest.mark.parametrize("name", [n for n, c in CORRECTIONS.items() if c.needs])
def test_what_it_needs_has_a_name_and_must_be_there(name: str) -> None:
    assert set(STATISTICS) >= CORRECTIONS[name].needs
    with pytest.raises(BitpressError, match="no calibration statistics"):
        terms_of(name, case()[0], Stats(0))


SICK: dict[str, Any] = {
    "zero channels": lambda x: x * (torch.arange(64) % 3 != 0),
    "one channel": lambda x: x * (torch.arange(64) == 5),
    "zero": lambda x: x * 0,
    "rank one": lambda x: x[:, :1] * x[:1],
    "huge": lambda x: x * 1e15,
    "tiny": lambda x: x * 1e-15,
}


@pytest.mark.parametrize("sickness", SICK)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_sick_inputs_end_in_a_weight_no_further_away(name: str, sickness: str) -> None:
    w, _ = case(4)
    x = SICK[sickness](torch.randn(200, 64, generator=torch.Generator().manual_seed(1)))
    stats = Stats(200, x.T @ x / 200, x.abs().mean(0))
    w_hat = compress_matrix(
        w, stats, LayerMethod(FMT, Named("quantizer", "", RTN()), corrections=tuple([CORRECTIONS[name](**settings(name))]))
    ).weight.dequantize()
    assert torch.isfinite(w_hat).all()
    assert (w_hat - w).norm() <= (RTN().quantize(w, None, FMT).weight.dequantize() - w).norm() * 1.001


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_of_any_size_are_survived(name: str, size: float) -> None:
    w, stats = case(5)
    assert all(torch.isfinite(t.dequantize()).all() for t in terms_of(name, w * size, stats))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_is_not_finite_is_refused(name: str) -> None:
    w, stats = case(6)
    correction = CORRECTIONS[name](**settings(name))
    rounded = RTN().quantize(w, None, FMT).weight
    for bad in (float("nan"), float("inf")):
        sick = w.clone()
        sick[3, 4] = bad
        with pytest.raises(NumericsError):
            correction.split(sick, stats, FMT) or correction.repair(sick, rounded, stats)
    with pytest.raises(NumericsError, match="fp16"):
        terms_of(name, w * 1e30, stats)
