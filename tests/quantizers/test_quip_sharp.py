"""QuIP#: BlockLDLQ and its sweeps against their formulas, and the second book."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import Packed, parse_format
from bitpress.quantizers.mechanisms.coordinate_descent import RIDGE
from bitpress.quantizers.quantizer import output_error
from bitpress.quantizers.quip_sharp import QuIPSharp
from bitpress.recipes import build_method, make_recipe
from bitpress.transforms.hadamard import HadamardBasis

DAMP = 0.01


def case(seed: int, out: int = 6, inner: int = 40) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inner, generator=generator) @ torch.randn(inner, inner, generator=generator)
    return torch.randn(out, inner, generator=generator), Stats(300, x.T @ x / 300)


def damped(stats: Stats) -> torch.Tensor:
    gram = stats.need_gram("test").double()
    return gram + DAMP * gram.diagonal().mean() * torch.eye(len(gram))


def rounded(values: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The nearest codewords under the scales of the whole rows of `w`."""
    fmt = parse_format("e8p-row")
    params = fmt.fit(w)
    return fmt.grid.decode(
        fmt.grid.encode(values.float(), fmt.columns(params, (w.shape[0], w.shape[1]), 0)), fmt.per_block(params)
    )


def block_ldlq(w: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Round eight columns, then move the open ones to where the output error of all rounded ones is least."""
    w_hat = w.clone()
    for start in range(0, w.shape[1], 8):
        target = w.double()
        if start:
            error = (w - w_hat)[:, :start].double()
            target[:, start:] += error @ gram[:start, start:] @ torch.linalg.inv(gram[start:, start:])
        w_hat[:, start : start + 8] = rounded(target[:, start : start + 8], w)
    return w_hat


def swept(w: torch.Tensor, w_hat: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    w_hat = w_hat.clone()
    for start in range(0, w.shape[1], 8):
        here = slice(start, start + 8)
        own = gram[here, here] + RIDGE * gram[here, here].diagonal().mean() * torch.eye(8)
        pull = (w - w_hat).double() @ gram[:, here] @ torch.linalg.inv(own)
        w_hat[:, here] = rounded(w_hat[:, here] + pull, w)
    return w_hat


@pytest.mark.parametrize("seed", range(3))
def test_block_ldlq_and_sweeps_are_their_formulas(seed: int) -> None:
    w, stats = case(seed)
    gram = damped(stats)
    first = block_ldlq(w, gram)
    assert torch.allclose(QuIPSharp(sweeps=0).quantize(w, stats, parse_format("e8p-row")).weight.dequantize(), first)
    second = swept(w, first, gram)
    assert not torch.equal(first, second)
    error = [((q - w).double() @ gram * (q - w)).sum(1) for q in (first, second)]
    best = torch.where((error[1] < error[0])[:, None], second, first)
    assert torch.allclose(QuIPSharp(sweeps=1).quantize(w, stats, parse_format("e8p-row")).weight.dequantize(), best)


def test_a_second_book_takes_what_the_first_leaves() -> None:
    w, stats = case(3, out=32, inner=64)
    fmt = parse_format("e8p-row")
    errors, bits = [], []
    for residual in ("none", "e81b", "e8p"):
        weight = QuIPSharp(residual=residual).quantize(w, stats, fmt).weight
        errors.append(output_error(w, weight.dequantize(), stats))
        bits.append([t.format.grid.code_bits / 8 for t in weight.terms if isinstance(t, Packed)])
    assert bits == [[2.0], [2.0, 1.0], [2.0, 2.0]]
    # One bit more is a quarter of the squared error at best; these books keep more than half of that.
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_the_error_that_is_fed_back_is_that_of_both_books() -> None:
    w, stats = case(4)
    both = QuIPSharp(residual="e8p", rms=1.03, sweeps=0).quantize(w, stats, parse_format("e8p-row")).weight
    alone = QuIPSharp(sweeps=0).quantize(w, stats, parse_format("e8p-row")).weight
    parts = [term.dequantize() for term in both.terms]
    # The first eight columns see no feedback: their first book is the only one of a weight without a second.
    assert torch.equal(parts[0][:, :8], alone.terms[0].dequantize()[:, :8])
    gram = damped(stats)
    error = (w - both.dequantize())[:, :8].double()
    target = w[:, 8:16].double() + (error @ gram[:8, 8:] @ torch.linalg.inv(gram[8:, 8:]))[:, :8]
    assert torch.allclose(parts[0][:, 8:16], rounded(target, w))


@pytest.mark.parametrize("block", ["row", "g16", "tensor", "2x32"])
def test_rows_in_another_order_give_their_codes_in_that_order(block: str) -> None:
    w, stats = case(5, out=8, inner=64)
    fmt = parse_format(f"e8p-{block}")
    order = torch.tensor([4, 5, 2, 3, 0, 1, 6, 7])
    first, second = (QuIPSharp(residual="e81b").quantize(v, stats, fmt).weight.dequantize() for v in (w, w[order]))
    assert torch.equal(first[order], second)


def test_what_it_cannot_do_is_refused() -> None:
    w, stats = case(6)
    with pytest.raises(FormatError, match="quip_sharp serves e8p"):
        QuIPSharp().quantize(w, stats, parse_format("int2-row"))
    for settings in ({"residual": "e8"}, {"rms": 0.0}, {"sweeps": -1}, {"damp": 0.0}):
        with pytest.raises(UsageError):
            QuIPSharp(**settings)


def test_its_recipe_puts_the_papers_basis_before_it() -> None:
    recipe = make_recipe({"weights": "e8p-row", "quantizer": "quip_sharp"})
    assert [name for name, _ in [(p.name, p.part) for p in build_method(recipe).of_key("transforms")]] == [
        "balance",
        "hadamard",
    ]
    assert [(p.name, p.part) for p in build_method(recipe).changes][1][1] == HadamardBasis(outputs=True)
    assert build_method(recipe).resolved()["transforms"][1] == {"name": "hadamard", "block": "row", "outputs": True, "seed": 0}
    assert [
        (p.name, p.part)
        for p in build_method(make_recipe({"weights": "e8p-row", "quantizer": "quip_sharp", "transforms": []})).of_key(
            "transforms"
        )
    ] == []
