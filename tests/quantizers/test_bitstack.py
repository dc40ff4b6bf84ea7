"""BitStack: terms of the weight scaled by its inputs, every prefix a weight, and figures that say what each block brings."""

import itertools

import pytest
import torch

from bitpress.calibration.stats import Stats
from bitpress.errors import CalibrationError, FormatError, NumericsError, UsageError
from bitpress.formats import CompressedWeight, Packed, parse_format
from bitpress.formats.bit_stack import shorten
from bitpress.formats.stack_budget import choose_blocks
from bitpress.quantizers.bitstack import BitStack
from bitpress.quantizers.quantizer import output_error

FMT = parse_format("binary-tensor")


def layer(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(48, 96, generator=generator) * (0.2 + torch.rand(48, 1, generator=generator))
    x = torch.randn(500, 96, generator=generator) * torch.exp(torch.randn(96, generator=generator))
    return w, Stats(500, x.T @ x / 500)


def by_hand(w: torch.Tensor, gram: torch.Tensor, terms: int, rank: int) -> torch.Tensor:
    """The algorithm of the public code in float64: signs, and the first singular vectors of the magnitudes, of what is left."""
    size = gram.diagonal().double().sqrt()
    left = w.double() * size
    for _ in range(terms):
        u, s, v = torch.linalg.svd(left.abs(), full_matrices=False)
        left = left - torch.where(left < 0, -1.0, 1.0) * ((u[:, :rank] * s[:rank]) @ v[:rank])
    return w.double() - left / size


@pytest.mark.parametrize(("terms", "rank"), [(1, 1), (1, 8), (3, 4)])
def test_it_is_the_algorithm_of_the_paper(terms: int, rank: int) -> None:
    w, stats = layer()
    weight = BitStack(terms=terms, rank=rank).quantize(w, stats, FMT).weight
    expected = by_hand(w, stats.need_gram("test"), terms, rank)
    # Factors are rounded to float16: 2^-11 of a magnitude each, and a sign may turn where next to nothing is left.
    assert float((weight.dequantize() - expected).norm() / expected.norm()) < 2e-3


def test_figures_are_those_of_the_prefixes() -> None:
    w, stats = layer(1)
    outcome = BitStack(terms=4, rank=4).quantize(w, stats, FMT)
    figures = outcome.figures
    for k in range(1, 5):
        prefix = shorten(outcome.weight, k)
        assert len(prefix.terms) == k
        assert figures[f"error_{k}"] == pytest.approx(output_error(w, prefix.dequantize(), stats), rel=1e-5)
        assert figures[f"bytes_{k}"] == prefix.nbytes
        rebuilt = CompressedWeight.build(prefix.spec(), prefix.tensors())
        assert torch.equal(rebuilt.dequantize(), prefix.dequantize())
    errors = [figures[f"error_{k}"] for k in range(1, 5)]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors))


def test_figures_choose_blocks() -> None:
    outcomes = {str(seed): BitStack(terms=3, rank=2).quantize(*layer(seed), FMT) for seed in range(3)}
    errors = {name: [o.figures[f"error_{k}"] for k in (1, 2, 3)] for name, o in outcomes.items()}
    ends = {name: [0, *(int(o.figures[f"bytes_{k}"]) for k in (1, 2, 3))] for name, o in outcomes.items()}
    nbytes = {name: [b - a for a, b in itertools.pairwise(at)] for name, at in ends.items()}
    budget = sum(o.weight.nbytes for o in outcomes.values()) * 2 // 3
    counts = choose_blocks(errors, nbytes, budget)
    assert sum(counts.values()) in (5, 6)
    assert sum(shorten(outcomes[name].weight, count).nbytes for name, count in counts.items()) <= budget


def test_large_inputs_are_nearer() -> None:
    w, stats = layer(2)
    even = Stats(500, torch.eye(96))
    errors = [output_error(w, BitStack(rank=4).quantize(w, s, FMT).weight.dequantize(), stats) for s in (stats, even)]
    assert errors[0] < 0.9 * errors[1]


def test_what_cannot_be_is_refused() -> None:
    w, stats = layer()
    with pytest.raises(UsageError, match="terms"):
        BitStack(terms=0)
    with pytest.raises(UsageError, match="smallest"):
        BitStack(smallest=0.0)
    with pytest.raises(FormatError, match="bitstack serves binary-tensor, not int2-row"):
        BitStack().quantize(w, stats, parse_format("int2-row"))
    with pytest.raises(CalibrationError, match="bitstack"):
        BitStack().quantize(w, None, FMT)
    with pytest.raises(NumericsError, match="NaN"):
        BitStack().quantize(w * torch.nan, stats, FMT)
    stack = BitStack(rank=2).quantize(w, stats, FMT).weight
    with pytest.raises(FormatError, match="cannot cut a stack of 2 terms to 3"):
        shorten(stack, 3)
    params = FMT.fit(w)
    with pytest.raises(FormatError, match="other terms"):
        shorten(CompressedWeight((Packed.pack(FMT, FMT.encode(w, params), params),)), 1)
