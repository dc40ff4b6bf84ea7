"""AQLM: first books, codes and words against their formulas."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import Packed, parse_format
from bitpress.quantizers.aqlm import AQLM, first_books, solve_words
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.mechanisms.coordinate_descent import prepare_descent
from bitpress.quantizers.quantizer import output_error


def case(seed: int, out: int = 32, inner: int = 32) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inner, generator=generator) @ torch.randn(inner, inner, generator=generator)
    return torch.randn(out, inner, generator=generator), Stats(300, x.T @ x / 300)


@pytest.mark.parametrize("fmt", ["aq2x3x4-row", "aq3x2x4-g8", "vq4x4-row", "aq2x3x4-2x8"])
def test_books_begin_with_what_the_books_before_leave(fmt: str) -> None:
    w, _ = case(0)
    parsed = parse_format(fmt)
    params = first_books(w, parsed)
    rows, cols = parsed.block.resolve((32, 32))
    squares = w.view(32 // rows, rows, 32 // cols, cols).square().mean((1, 3))
    assert torch.allclose(params["scale"], squares.sqrt(), rtol=1e-3)
    assert params["words"].shape == parsed.grid.params[1].shape
    error = (parsed.decode(parsed.encode(w, params), params) - w).square().sum()
    if params["words"].ndim == 3:
        without_last = {**params, "words": params["words"].clone()}
        without_last["words"][-1] = 0
        assert error < 0.8 * (parsed.decode(parsed.encode(w, without_last), without_last) - w).square().sum()
    assert error < 0.6 * w.square().sum()


@pytest.mark.parametrize("fmt", ["aq2x3x4-row", "vq3x4-g8", "aq3x2x2-row"])
def test_words_approach_the_least_squares_solution(fmt: str) -> None:
    w, stats = case(1)
    parsed, gram = parse_format(fmt), stats.need_gram("test")
    params = first_books(w, parsed)
    codes = parsed.encode(w, params)
    # Written out: the weight is linear in the words.
    shape = params["words"].shape
    count = params["words"].numel()
    basis = [parsed.decode(codes, {**params, "words": e.view(shape)}) for e in torch.eye(count)]
    root = torch.linalg.cholesky(gram.double())
    design = torch.stack([(b.double() @ root).flatten() for b in basis], 1)
    solution = torch.linalg.lstsq(design, (w.double() @ root).flatten(), driver="gelsd").solution
    best = (design @ solution - (w.double() @ root).flatten()).square().sum()
    error = []
    for steps in (1, 4, 16, 300):
        words = solve_words(w, codes, params, gram, parsed, steps)
        w_hat = parsed.decode(codes, {**params, "words": words.view(shape)})
        error.append(((w_hat - w) @ root.float()).square().sum())
    start = ((parsed.decode(codes, params) - w) @ root.float()).square().sum()
    assert start > error[0] > error[1] > error[2] >= best * (1 - 1e-4)
    assert torch.allclose(error[3].double(), best, rtol=1e-3)


def test_a_search_leaves_no_single_code_that_is_better() -> None:
    w, stats = case(2, out=6, inner=16)
    fmt = parse_format("aq2x2x4-row")
    method = AQLM(damp=1e-4)  # all beginnings of the 16 sums fit in its beam
    outcome = method.quantize(w, stats, fmt)
    packed = outcome.weight.terms[0]
    assert isinstance(packed, Packed)
    codes, params = packed.unpack()
    gram = stats.need_gram("test") + 1e-4 * stats.need_gram("test").diagonal().mean() * torch.eye(16)
    # Searches without learning until nothing changes.
    descent = prepare_descent(stats.need_gram("test"), torch.arange(16), 4, 1e-4)
    roots = torch.linalg.cholesky(torch.linalg.inv(descent.inverse))
    for _ in range(30):
        target = descent.relax(w, fmt.decode(codes, params))
        codes = method._search(target, descent.order, descent.factor, roots, fmt, params, codes)

    def errors(trial: torch.Tensor) -> torch.Tensor:
        difference = fmt.decode(trial, params) - w
        return (difference @ gram * difference).sum(1)

    own = errors(codes)
    for group in range(4):
        for code in range(16):
            changed = codes.clone()
            changed[:, group] = code
            # Groups weigh errors by their part of the gram with a ridge of 1e-4: a tie may go to the other side by that.
            assert (errors(changed) >= own * (1 - 1e-3)).all()


def test_every_round_lowers_the_error_and_learning_beats_feedback_alone() -> None:
    w, stats = case(3, out=96, inner=64)
    fmt = parse_format("aq2x4x4-row")
    errors = [
        output_error(w, AQLM(rounds=rounds, tolerance=0).quantize(w, stats, fmt).weight.dequantize(), stats)
        for rounds in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < output_error(w, GPTQ().quantize(w, stats, fmt).weight.dequantize(), stats)


def test_a_wider_beam_finds_better_sums() -> None:
    w, stats = case(4, out=96, inner=64)
    fmt = parse_format("aq2x5x4-row")
    narrow, wide = (
        output_error(w, AQLM(beam=beam, rounds=1).quantize(w, stats, fmt).weight.dequantize(), stats) for beam in (1, 16)
    )
    assert wide < narrow


def test_a_weight_of_zeros_stays_zero() -> None:
    _, stats = case(5)
    assert not AQLM().quantize(torch.zeros(8, 32), stats, parse_format("aq2x3x4-row")).weight.dequantize().any()


def test_what_it_cannot_do_is_refused() -> None:
    w, stats = case(6)
    with pytest.raises(FormatError, match=r"aqlm serves aq\*, vq\*"):
        AQLM().quantize(w, stats, parse_format("e8p-row"))
    with pytest.raises(NumericsError, match="NaN"):
        AQLM().quantize(w.fill_diagonal_(torch.nan), stats, parse_format("aq2x3x4-row"))
    for settings in ({"beam": 0}, {"rounds": -1}, {"steps": 0}, {"tolerance": 1.0}):
        with pytest.raises(UsageError):
            AQLM(**settings)
