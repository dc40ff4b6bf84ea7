"""The distance of two models against a slow second opinion."""

import math

import pytest
import torch

from bitpress.errors import NumericsError, UsageError
from bitpress.evaluation import measure_distance


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
