"""The distance of two models against a slow second opinion."""

import math

import pytest
import torch

from bitpress import native
from bitpress.errors import NumericsError, UsageError
from bitpress.evaluation import measure_distance
from bitpress.evaluation.distance import by_kind, compare_rows


def tables(
    seed: int, windows: int = 5, length: int = 150, vocabulary: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (windows, length), generator=generator)
    p = torch.randn(windows, length, vocabulary, generator=generator) * 2
    return tokens, p, p + torch.randn(p.shape, generator=generator) * 0.5


def reader(table: torch.Tensor):  # type: ignore[no-untyped-def]
    order = iter(table)
    return lambda tokens: next(order)[None]


def test_against_torch_in_float64() -> None:
    tokens, p, q = tables(0)
    got = measure_distance(reader(p), reader(q), tokens)
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    # float32 log-softmax: errors of some 1e-7 a term, averaged.
    assert got.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert got.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-12)
    for logits, value in ((log_q, got.perplexity), (log_p, got.perplexity_original)):
        nll = torch.nn.functional.nll_loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert value == pytest.approx(math.exp(nll), rel=1e-5)
    means = kl.mean(1)
    assert got.kl_ci95 == pytest.approx(2.776 * float(means.std()) / math.sqrt(5), rel=1e-4)
    assert (got.tokens, got.windows) == (750, 5)


def test_a_model_is_at_no_distance_from_itself() -> None:
    tokens, p, _ = tables(1)
    got = measure_distance(reader(p), reader(p), tokens)
    assert got.kl_mean == 0.0
    assert got.top1_agreement == 1.0
    assert got.perplexity == got.perplexity_original


def test_the_student_quantile_of_large_samples() -> None:
    tokens, p, q = tables(2, windows=31, length=4)
    got = measure_distance(reader(p), reader(q), tokens)
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    means = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    assert got.kl_ci95 == pytest.approx(2.0423 * float(means.std()) / math.sqrt(31), rel=1e-3)  # t(0.975, 30) = 2.0423


def test_one_window_has_no_interval() -> None:
    tokens, p, q = tables(3, windows=1)
    assert measure_distance(reader(p), reader(q), tokens).kl_ci95 == math.inf


def test_logits_that_are_not_finite_are_named() -> None:
    tokens, p, q = tables(4)
    q[2, 3, 4] = float("nan")
    with pytest.raises(NumericsError, match="the compressed model"):
        measure_distance(reader(p), reader(q), tokens)


def test_bad_windows_and_different_vocabularies() -> None:
    tokens, p, q = tables(5)
    with pytest.raises(UsageError, match="2 tokens or more"):
        measure_distance(reader(p), reader(q), tokens[:, :1])
    with pytest.raises(UsageError, match="vocabularies of 40 and 39"):
        measure_distance(reader(p), reader(q[..., :39]), tokens)


@pytest.mark.skipif(not native.available(), reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 16, 17, 1024, 1041, 5000])
def test_native_rows_against_torch_in_float64(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    p = (torch.randn(37, vocabulary, generator=generator) * 8 + 30).to(dtype)
    q = (p.float() + torch.randn(p.shape, generator=generator) * 0.3 - 50).to(dtype)
    p[3], q[4] = 2.0, -1.0  # ties: the first of them is the most likely token of both
    following = torch.randint(0, vocabulary, (37,), generator=generator)
    following[::5] = -1
    figures, bad = native.compare_rows(p, q, following)
    assert bad == 0
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    # e^x within 2e-7 of it, 64 terms a float32 sum; p - q reaches 3 here.
    torch.testing.assert_close(figures[0], kl, rtol=2e-6, atol=2e-6)
    assert figures[1].tolist() == (p.double().argmax(-1) == q.double().argmax(-1)).double().tolist()
    for row, logs in zip(figures[2:], (log_p, log_q), strict=True):
        wanted = -logs.gather(1, following.clamp(min=0)[:, None])[:, 0] * (following >= 0)
        torch.testing.assert_close(row, wanted, rtol=2e-6, atol=2e-6)
    reference, _ = compare_rows(p, q, following)
    torch.testing.assert_close(figures, reference, rtol=1e-5, atol=2e-5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again, _ = native.compare_rows(p, q, following)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(figures, again)


@pytest.mark.skipif(not native.available(), reason="needs the native library")
@pytest.mark.parametrize("place", [0, 15, 16, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_native_rows_say_whose_logits_are_not_finite(value: float, place: int) -> None:
    following = torch.zeros(3, dtype=torch.int64)
    fine = torch.randn(3, 41)
    sick = fine.clone()
    sick[1, place] = value
    for p, q, wanted in ((fine, fine, 0), (sick, fine, 1), (fine, sick, 2), (sick, sick, 3)):
        assert native.compare_rows(p, q, following)[1] == compare_rows(p, q, following)[1] == wanted


@pytest.mark.parametrize(("length", "edges"), [(2, [(0, 0), (1, 1)]), (11, [(0, 0), (1, 1), (2, 3), (4, 7), (8, 10)])])
def test_positions_and_windows_are_parts_of_the_mean(length: int, edges: list[tuple[int, int]]) -> None:
    tokens, p, q = tables(6, length=length)
    got = measure_distance(reader(p), reader(q), tokens)
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert [(part.first, part.last) for part in got.by_position] == edges
    for part in got.by_position:
        means = kl[:, part.first : part.last + 1].mean(1)
        assert part.kl_mean == pytest.approx(float(means.mean()), rel=1e-4)
        assert part.kl_ci95 == pytest.approx(2.776 * float(means.std()) / math.sqrt(5), rel=1e-3)
    assert got.kl_by_window == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    kinds = by_kind(["prose", "verse", "prose", "letters", "prose"], got.kl_by_window)
    assert [(found.text, found.windows) for found in kinds] == [("prose", 3), ("verse", 1), ("letters", 1)]
    assert kinds[0].kl_mean == pytest.approx(float(kl[[0, 2, 4]].mean()), rel=1e-4)
    assert kinds[0].kl_ci95 == pytest.approx(4.303 * float(kl[[0, 2, 4]].mean(1).std()) / math.sqrt(3), rel=1e-3)
    assert kinds[1].kl_ci95 == math.inf
