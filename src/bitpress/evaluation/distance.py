"""Distance of one language model from another: KL divergence, agreement, perplexity, over functions from tokens to logits.

    KL at a position    sum_v p(v) (log p(v) - log q(v)), p the original's and q the compressed model's distribution, in nats
    agreement           share of positions where both name the same most likely token
    perplexity          exp of the mean negative log-likelihood of the next token inside a window

The 95 % interval is that of the mean over windows (Student's t), because positions of one window are not independent. So it is for the
distance at some positions (0, 1, 2 to 3, 4 to 7, ...: the error of a model with little context before it differs most) and on some windows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native
from bitpress.errors import NumericsError, UsageError

__all__ = [
    "AtPositions",
    "Distance",
    "OnWindows",
    "Perplexity",
    "by_kind",
    "measure_distance",
    "measure_perplexity",
    "without_details",
]

Logits = Callable[[torch.Tensor], torch.Tensor]

# Positions compared at once in torch; 16 x 49,152 floats are 3 MB, so that intermediate results stay in the processor's cache.
ROWS = 16
# Figures of a distance that are lists.
_DETAILS = ("kl_by_window", "by_position")


@dataclass(frozen=True)
class AtPositions:
    """The mean KL divergence at the positions `first` to `last` of all windows, counted from 0."""

    first: int
    last: int
    kl_mean: float
    kl_ci95: float


@dataclass(frozen=True)
class OnWindows:
    """The mean KL divergence on the windows of one kind of text."""

    text: str
    windows: int
    kl_mean: float
    kl_ci95: float


@dataclass(frozen=True)
class Distance:
    """The result of `measure_distance`. `kl_ci95` and `top1_ci95` are half widths; `kl_by_window` are the means of single windows."""

    kl_mean: float
    kl_ci95: float
    top1_agreement: float
    top1_ci95: float
    perplexity: float
    perplexity_original: float
    tokens: int
    windows: int
    kl_by_window: tuple[float, ...] = ()
    by_position: tuple[AtPositions, ...] = ()


def measure_distance(
    original: Logits,
    candidate: Logits,
    windows: Int[torch.Tensor, "windows length"],
    note: Callable[[int], None] = lambda done: None,
) -> Distance:
    """Compare two models on windows of tokens; each function maps `[1, length]` to `[1, length, vocabulary]`.

    They are compared on the device that the original's logits are on.

    Raises NumericsError when a logit is not finite, UsageError for windows of fewer than 2 tokens.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"evaluation needs windows of 2 tokens or more, got {list(windows.shape)}.")
    kl, agree, nll_p, nll_q, at = [], [], [], [], []
    for i, window in enumerate(windows):
        p, q = original(window[None])[0], candidate(window[None])[0]
        if p.shape != q.shape:
            raise UsageError(
                f"the two models have vocabularies of {p.shape[-1]} and {q.shape[-1]} tokens; they cannot be compared."
            )
        figures = _compare(p, q.to(p.device), window.to(p.device))
        # KL is never negative; rounding can make a position -1e-9, which the mean keeps, unclipped.
        sums = [math.fsum(column) for column in figures.tolist()]
        at.append(figures[0].tolist())
        kl.append(sums[0] / window.numel())
        agree.append(sums[1] / window.numel())
        nll_p.append(sums[2] / (window.numel() - 1))
        nll_q.append(sums[3] / (window.numel() - 1))
        note(i + 1)
    return Distance(
        kl_mean=_mean(kl),
        kl_ci95=_half_width(kl),
        top1_agreement=_mean(agree),
        top1_ci95=_half_width(agree),
        perplexity=_exp(_mean(nll_q)),
        perplexity_original=_exp(_mean(nll_p)),
        tokens=windows.numel(),
        windows=windows.shape[0],
        kl_by_window=tuple(kl),
        by_position=_by_position(at),
    )


def by_kind(kinds: Sequence[str], values: Sequence[float]) -> tuple[OnWindows, ...]:
    """Return the mean and its interval over the windows of every kind of text, in the order of the kinds' first windows."""
    own = {kind: [value for at, value in zip(kinds, values, strict=True) if at == kind] for kind in dict.fromkeys(kinds)}
    return tuple(OnWindows(kind, len(found), _mean(found), _half_width(found)) for kind, found in own.items())


def without_details(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return a distance without the figures of single windows and positions."""
    return {name: value for name, value in figures.items() if name not in _DETAILS}


def _by_position(rows: Sequence[Sequence[float]]) -> tuple[AtPositions, ...]:
    """Return the distance at position 0, at 1, at 2 to 3, at 4 to 7 and so on; a row holds the divergences of one window."""
    length, found, first = len(rows[0]), [], 0
    while first < length:
        last = min(max(2 * first, 1), length) - 1
        means = [_mean(row[first : last + 1]) for row in rows]
        found.append(AtPositions(first, last, _mean(means), _half_width(means)))
        first = last + 1
    return tuple(found)


@dataclass(frozen=True)
class Perplexity:
    """The result of `measure_perplexity`. `perplexity_low` and `perplexity_high` are the ends of the 95 % interval."""

    perplexity: float
    perplexity_low: float
    perplexity_high: float
    tokens: int
    windows: int


def measure_perplexity(
    model: Logits, windows: Int[torch.Tensor, "windows length"], note: Callable[[int], None] = lambda done: None
) -> Perplexity:
    """Measure one model on windows of tokens, as `measure_distance` measures two.

    Raises NumericsError when a logit is not finite, UsageError for windows of fewer than 2 tokens.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"evaluation needs windows of 2 tokens or more, got {list(windows.shape)}.")
    nll = []
    for i, window in enumerate(windows):
        logits = model(window[None])[0]
        window = window.to(logits.device)
        following = torch.cat([window[1:], window.new_full((1,), -1)])
        total, bad = 0.0, False
        for rows, tokens in zip(logits.split(ROWS), following.split(ROWS), strict=True):
            logs = torch.log_softmax(rows.float(), -1)
            bad |= not bool(torch.isfinite(logs).all())
            picked = logs.gather(1, tokens.clamp(min=0)[:, None])[:, 0].double() * (tokens >= 0)
            total -= float(picked.sum())
        if bad:
            raise NumericsError("the logits of the model are not finite.")
        nll.append(total / (window.numel() - 1))
        note(i + 1)
    mean, half = _mean(nll), _half_width(nll)
    return Perplexity(_exp(mean), _exp(mean - half), _exp(mean + half), windows.numel(), windows.shape[0])


def _compare(
    p: Float[torch.Tensor, "length vocabulary"], q: Float[torch.Tensor, "length vocabulary"], window: torch.Tensor
) -> Float[torch.Tensor, "4 length"]:
    """Return KL, agreement and both negative log-likelihoods at every position of one window."""
    following = torch.cat([window[1:], window.new_full((1,), -1)])
    if native.available() and p.device.type == q.device.type == "cpu" and p.shape[-1] > 0:
        if p.dtype != q.dtype or p.dtype not in (torch.float32, torch.bfloat16):
            p, q = p.float(), q.float()
        figures, bad = native.compare_rows(p, q, following)
    else:
        figures, bad = compare_rows(p, q, following)
    if bad:
        raise NumericsError(f"the logits of {'the original' if bad & 1 else 'the compressed model'} are not finite.")
    return figures


def compare_rows(
    p: Float[torch.Tensor, "rows vocabulary"], q: Float[torch.Tensor, "rows vocabulary"], following: Int[torch.Tensor, " rows"]
) -> tuple[Float[torch.Tensor, "4 rows"], int]:
    """Return the result of `native.compare_rows`, computed in torch."""
    figures, bad = [], 0
    for p_rows, q_rows, tokens in zip(p.split(ROWS), q.split(ROWS), following.split(ROWS), strict=True):
        log_p, log_q = torch.log_softmax(p_rows.float(), -1), torch.log_softmax(q_rows.float(), -1)
        bad |= (not bool(torch.isfinite(log_p).all())) | (not bool(torch.isfinite(log_q).all())) << 1
        kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        agrees = (log_p.argmax(-1) == log_q.argmax(-1)).double()
        index = tokens.clamp(min=0)[:, None]
        nll = [-logs.gather(1, index)[:, 0].double() * (tokens >= 0) for logs in (log_p, log_q)]
        figures.append(torch.stack([kl, agrees, *nll]))
    return torch.cat(figures, 1), bad


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _half_width(values: Sequence[float]) -> float:
    """Return half the 95 % interval of the mean; infinite for a single window."""
    n = len(values)
    if n < 2:
        return math.inf
    mean = _mean(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return _student_t95(n - 1) * deviation / math.sqrt(n)


def _student_t95(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t (table to 10 degrees, then the Cornish-Fisher expansion: below 0.1 % off)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
