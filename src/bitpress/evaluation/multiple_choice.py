"""Multiple-choice questions: how likely each choice is after its context, over a function from tokens to logits.

    score of a choice    sum of log p(token | all tokens before it) over the tokens that the choice adds to its context, in nats
    acc                  share of questions whose answer has the highest score; of equal ones the first counts
    acc_norm             the same with every score divided by the number of characters of its choice
    standard error       of a share p of n questions: sqrt(p (1 - p) / (n - 1))

Source   lm-evaluation-harness, `_encode_pair`, `_loglikelihood_tokens` and the results of `multiple_choice`: context and choice are
         tokenized together, white space at the context's end goes with the choice; inputs longer than the context are truncated from the left.
Differs  if the start of a choice joins the last token of the context, that token is scored; the harness tokenizes the context
         without the choice and loses the joined characters. A choice whose tokens are a prefix of another choice's shares its row.
Cost     rows of like lengths are padded on the right to one batch; earlier positions of a causal model do not see the padding.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import NumericsError, UsageError

__all__ = ["Accuracy", "Batch", "Question", "QuestionSet", "lay_out", "measure_accuracy", "score_choices"]

# Positions of a batch; logits for all of them at a vocabulary of 49,152 are 100 MB in float32.
BATCH_TOKENS = 512
# Lengths are rounded up to a multiple of this, so that a model sees few shapes.
ROUND = 8
# Positions whose probabilities are taken at once, as in `distance`.
ROWS = 16

Encode = Callable[[str], Sequence[int]]
# From a batch's tokens [rows, length] and flat positions in it to the logits there [scored, vocabulary].
LogitsAt = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Question:
    """A context, the choices exactly as they would follow it, and which of them is right. Raises UsageError."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices):
            raise UsageError("a question needs two choices or more, none of them empty.")
        if not 0 <= self.answer < len(self.choices):
            raise UsageError(f"answer={self.answer}: must be the index of one of the {len(self.choices)} choices, from 0.")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, the flat positions that predict tokens of choices, those tokens, and the index of the choice of each."""

    tokens: Int[torch.Tensor, "rows length"]
    at: Int[torch.Tensor, " scored"]
    targets: Int[torch.Tensor, " scored"]
    owners: Int[torch.Tensor, " scored"]


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and the batches of all their choices; choices are numbered through all questions."""

    questions: tuple[Question, ...]
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Accuracy:
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    documents: int


@dataclass
class _Row:
    """The tokens that a model reads, and (position, token, index of the choice) for every token that it has to predict."""

    tokens: list[int]
    scored: list[tuple[int, int, int]]


def lay_out(
    questions: Iterable[Question],
    encode: Encode,
    *,
    begin: Sequence[int] = (),
    first: int | None = None,
    limit: int | None = None,
) -> QuestionSet:
    """Tokenize questions and lay their choices out in batches.

    encode    returns the tokens of a text, without special tokens
    begin     the tokens that the tokenizer puts before every text
    first     the token for an empty context if `begin` is empty
    limit     the model's context; longer inputs are truncated from the left

    Raises UsageError for no questions, and for a choice that cannot be scored.
    """
    questions = tuple(questions)
    if not questions:
        raise UsageError("there are no questions to measure on.")
    rows: list[_Row] = []
    number = 0
    for index, question in enumerate(questions, start=1):
        own: list[_Row] = []
        known = [*begin, *encode(question.context.rstrip())]
        pairs = []
        for choice in question.choices:
            whole = [*begin, *encode(question.context + choice)]
            pairs.append((number, *_cut(known, whole, first, limit, f"question {index}, choice {choice!r}")))
            number += 1
        for owner, tokens, start in sorted(pairs, key=lambda pair: -len(pair[1])):
            read = tokens[:-1]
            row = next((row for row in own if row.tokens[: len(read)] == read), None)
            if row is None:
                row = _Row(read, [])
                own.append(row)
            row.scored += [(k - 1, tokens[k], owner) for k in range(start, len(tokens))]
        rows += own
    return QuestionSet(questions, tuple(_batches(rows, limit)))


def score_choices(logits: LogitsAt, task: QuestionSet, note: Callable[[int], None] = lambda done: None) -> list[list[float]]:
    """Return the log-likelihood of every choice of every question. `logits` is called once for each batch, in order.

    Raises NumericsError when a probability is not finite.
    """
    scores = torch.zeros(sum(len(question.choices) for question in task.questions), dtype=torch.float64)
    for done, batch in enumerate(task.batches, start=1):
        found = _log_probabilities(logits(batch.tokens, batch.at), batch.targets)
        if not bool(torch.isfinite(found).all()):
            raise NumericsError("the logits of the model are not finite.")
        scores.index_add_(0, batch.owners, found)
        note(done)
    return [part.tolist() for part in scores.split([len(question.choices) for question in task.questions])]


def measure_accuracy(logits: LogitsAt, task: QuestionSet, note: Callable[[int], None] = lambda done: None) -> Accuracy:
    """Answer every question by the likelihood of its choices. Raises what `score_choices` raises."""
    hits = normed = 0
    for question, scores in zip(task.questions, score_choices(logits, task, note), strict=True):
        hits += _best(scores) == question.answer
        normed += _best([s / len(choice) for s, choice in zip(scores, question.choices, strict=True)]) == question.answer
    n = len(task.questions)
    return Accuracy(hits / n, _stderr(hits / n, n), normed / n, _stderr(normed / n, n), n)


def _cut(known: Sequence[int], whole: list[int], first: int | None, limit: int | None, where: str) -> tuple[list[int], int]:
    """Return the tokens of context and choice, truncated from the left, and the position at which the choice begins."""
    start = next((k for k, (a, b) in enumerate(zip(known, whole, strict=False)) if a != b), min(len(known), len(whole)))
    if start == len(whole):
        raise UsageError(f"{where}: adds no token to its context; use a longer choice.")
    if start == 0:
        if first is None:
            raise UsageError(f"{where}: has no context, and the tokenizer has no token to begin a text with; add a context.")
        whole, start = [first, *whole], 1
    dropped = 0 if limit is None else max(len(whole) - limit - 1, 0)  # the last token is predicted, not read
    if start - dropped < 1:
        raise UsageError(f"{where}: has {len(whole) - start} tokens, too many for a model with a context of {limit}.")
    return whole[dropped:], start - dropped


def _batches(rows: Sequence[_Row], limit: int | None) -> Iterable[Batch]:
    """Put rows whose lengths round up to the same into batches, short ones first."""
    by_length: dict[int, list[_Row]] = {}
    for row in rows:
        length = -(-len(row.tokens) // ROUND) * ROUND
        by_length.setdefault(length if limit is None else min(length, limit), []).append(row)
    for length, alike in sorted(by_length.items()):
        size = max(BATCH_TOKENS // length, 1)
        for a in range(0, len(alike), size):
            part = alike[a : a + size]
            tokens = torch.tensor([row.tokens + [0] * (length - len(row.tokens)) for row in part])
            scored = [(i * length + at, target, owner) for i, row in enumerate(part) for at, target, owner in row.scored]
            yield Batch(tokens, *torch.tensor(scored).unbind(1))


def _log_probabilities(
    logits: Float[torch.Tensor, "scored vocabulary"], targets: Int[torch.Tensor, " scored"]
) -> Float[torch.Tensor, " scored"]:
    parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([torch.log_softmax(rows.float(), -1).gather(1, t[:, None])[:, 0].double() for rows, t in parts])


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _stderr(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.inf
