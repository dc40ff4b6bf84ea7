"""Choosing a token: what can be drawn and how often, against transformers' own processors."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitpress import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

DRAWS = 20_000
USUAL: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SETTINGS: list[dict[str, float]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 2.0, "top_k": 8, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 8, "top_p": 0.8, "min_p": 0.3, "repetition_penalty": 1.5},
    {"temperature": 0.5, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    {"temperature": 5.0, "min_p": 0.4, "top_k": 6},
]
BEFORE = [3, 3, 7, 0, 11, 3]


def draw_logits(size: int, seed: int = 0, spread: float = 1.5) -> np.ndarray:
    return (spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))).numpy()


def pick(
    logits: np.ndarray, settings: dict[str, float], seed: int = 0, before: Sequence[int] = (), count: int = 1
) -> list[int]:
    """Draw so many tokens in a row from one seed."""
    library = native.library()
    how, random = library.Sampling(**{**USUAL, **settings}), library.Random(seed)
    seen = np.array(before, np.int32)
    return [library.pick(logits, seen, how, random) for _ in range(count)]


def probabilities(logits: np.ndarray, settings: dict[str, float], before: Sequence[int] = ()) -> torch.Tensor:
    """Return every token's probability by transformers' processors, in the order in which `generate` applies them."""
    how = {**USUAL, **settings}
    processors: list[Any] = []
    if how["repetition_penalty"] != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
    if how["temperature"] != 1.0:
        processors.append(TemperatureLogitsWarper(how["temperature"]))
    if how["top_k"] > 0:
        processors.append(TopKLogitsWarper(int(how["top_k"])))
    if how["top_p"] < 1.0:
        processors.append(TopPLogitsWarper(how["top_p"]))
    if how["min_p"] > 0.0:
        processors.append(MinPLogitsWarper(how["min_p"]))
    scores = LogitsProcessorList(processors)(torch.tensor([list(before)]), torch.from_numpy(logits).double()[None])
    return scores[0].softmax(-1)


def is_likely(drawn: Sequence[int], probability: torch.Tensor) -> bool:
    """Say whether Pearson's chi-square of the counts stays below its quantile of one in a million, after Wilson and Hilferty.

    Tokens of fewer than 5 draws to be expected count as one, as the approximation wants.
    """
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probability)).double()
    if bool((counts[probability == 0] > 0).any()):
        return False
    mean = probability.double() * len(drawn)
    rare = mean < 5
    mean = torch.cat([mean[~rare], mean[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    free = int((mean > 0).sum()) - 1
    if free == 0:
        return True
    statistic = float(((counts - mean).square() / mean)[mean > 0].sum())
    part = 2 / (9 * free)
    return statistic <= free * (1 - part + 4.753 * math.sqrt(part)) ** 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict[str, float]) -> None:
    logits = draw_logits(12)
    wanted = probabilities(logits, settings, BEFORE)
    drawn = pick(logits, settings, 1, BEFORE, DRAWS)
    assert is_likely(drawn, wanted)
    # Of 20 draws to be expected, none comes once in half a billion times.
    assert set((wanted * DRAWS > 20).nonzero()[:, 0].tolist()) <= set(drawn)
    # One draw each from many seeds is as good as many from one: seeds that follow each other have nothing in common.
    assert is_likely([pick(logits, settings, seed, BEFORE)[0] for seed in range(5000)], wanted)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"temperature": 1.0}, {"temperature": 1.1}),
        ({"top_k": 5}, {"top_k": 6}),
        ({"top_p": 0.5}, {"top_p": 0.7}),
        ({"min_p": 0.05}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.2}),
        ({"temperature": 2.0, "min_p": 0.3}, {"temperature": 1.0, "min_p": 0.3}),
    ],
    ids=str,
)
def test_the_test_of_frequencies_notices_other_settings(settings: dict[str, float], wrong: dict[str, float]) -> None:
    logits = draw_logits(12)
    assert not is_likely(pick(logits, settings, 1, BEFORE, DRAWS), probabilities(logits, wrong, BEFORE))


@pytest.mark.parametrize("settings", [s for s in SETTINGS if {"top_k", "top_p", "min_p"} & set(s)], ids=str)
def test_what_can_be_drawn_of_a_large_vocabulary_is_what_transformers_keeps(settings: dict[str, float]) -> None:
    for seed in range(3):
        logits = draw_logits(3000, seed, 4.0)
        wanted = probabilities(logits, settings, BEFORE)
        drawn = pick(logits, settings, seed, BEFORE, 300)
        assert set(drawn) <= set(wanted.nonzero()[:, 0].tolist())
        assert set((wanted * 300 > 20).nonzero()[:, 0].tolist()) <= set(drawn)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-6}, {"top_p": 1e-6}, {"min_p": 1.0}]
)
@pytest.mark.parametrize("penalty", [1.0, 1.4, 0.6])
def test_greedy_is_the_most_likely_after_the_penalty(settings: dict[str, float], penalty: float) -> None:
    for seed in range(50):
        logits = draw_logits(40, seed)
        how = {**settings, "repetition_penalty": penalty}
        best = int(probabilities(logits, {"repetition_penalty": penalty}, BEFORE).argmax())
        assert pick(logits, how, seed, BEFORE) == [best]


def test_among_equals_the_first_is_the_most_likely() -> None:
    logits = np.array([1.0, 2.0, 2.0, 0.0, 2.0], np.float32)
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert pick(logits, settings, 5) == [1]
    assert set(pick(logits, {"top_k": 2}, 5, count=200)) == {1, 2}


def test_a_seed_gives_the_same_draws() -> None:
    logits = draw_logits(50)
    for settings in SETTINGS:
        assert pick(logits, settings, 9, BEFORE, 50) == pick(logits, settings, 9, BEFORE, 50)
    assert pick(logits, {}, 9, count=50) != pick(logits, {}, 10, count=50)


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs of Vigna's splitmix64 for the seed 1234567, their upper 53 bits as a fraction of a vocabulary."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    size = 1 << 20
    assert pick(np.zeros(size, np.float32), {}, 1234567, count=5) == [value >> 44 for value in published]


def test_large_logits_do_not_overflow() -> None:
    for top in (1e4, 3e38):
        logits = np.array([top, top, -top, 0.0], np.float32)
        assert set(pick(logits, {}, 0, count=100)) == {0, 1}
        assert set(pick(logits, {"temperature": 1e-3, "top_p": 0.9}, 0, count=100)) == {0, 1}
    assert pick(np.full(3, -np.inf, np.float32), {"temperature": 0.0}) == [0]
    hidden = np.array([-np.inf, 0.5, -np.inf, 0.4], np.float32)
    assert set(pick(hidden, {"top_p": 0.99}, 0, count=100)) == {1, 3}
