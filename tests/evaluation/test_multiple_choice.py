"""Log-likelihoods of choices against probabilities written down by hand, and everything that could put a token in the wrong place."""

import math
from collections.abc import Sequence

import pytest
import torch

from bitpress.errors import NumericsError, UsageError
from bitpress.evaluation import Question, QuestionSet, lay_out, measure_accuracy, score_choices
from bitpress.evaluation import multiple_choice as choices

# A bigram model over the letters of these words; "." begins a text, "X" is what "ab" becomes where it stands together.
LETTERS = ".abcX"
P = {
    ".": {".": 0.1, "a": 0.4, "b": 0.2, "c": 0.2, "X": 0.1},
    "a": {".": 0.1, "a": 0.2, "b": 0.5, "c": 0.1, "X": 0.1},
    "b": {".": 0.2, "a": 0.1, "b": 0.05, "c": 0.6, "X": 0.05},
    "c": {".": 0.1, "a": 0.3, "b": 0.2, "c": 0.1, "X": 0.3},
    "X": {".": 0.2, "a": 0.2, "b": 0.2, "c": 0.2, "X": 0.2},
}
TABLE = torch.tensor([[math.log(P[a][b]) for b in LETTERS] for a in LETTERS], dtype=torch.float64)
# Probabilities are taken in float32: half a unit in the last place of each log and of the sum of the exponentials.
CLOSE = 8 * torch.finfo(torch.float32).eps


def encode(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def merging(text: str) -> list[int]:
    return encode(text.replace("ab", "X"))


def bigram(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return TABLE[tokens].flatten(0, 1)[at]


def task(*rows: tuple[str, Sequence[str], int], **settings: object) -> QuestionSet:
    settings = {"encode": encode} | settings
    return lay_out([Question(context, tuple(words), answer) for context, words, answer in rows], **settings)  # type: ignore[arg-type]


def log(*steps: str) -> float:
    return math.fsum(math.log(P[a][b]) for a, b in steps)


def test_scores_are_sums_over_the_tokens_that_a_choice_adds() -> None:
    made = task(("ca", ["b", "bc", "ccc"], 1), ("b", ["a", "c"], 1))
    found = score_choices(bigram, made)
    assert found[0] == pytest.approx([log("ab"), log("ab", "bc"), log("ac", "cc", "cc")], rel=CLOSE)
    assert found[1] == pytest.approx([log("ba"), log("bc")], rel=CLOSE)


def test_accuracy_and_its_standard_error() -> None:
    rows = [
        ("ca", ["b", "bc"], 0),  # 0.5 against 0.5 * 0.6: right; by letter log 0.5 against log(0.3) / 2: wrong
        ("ca", ["b", "bc"], 1),  # and the other way round
        ("b", ["a", "c"], 1),  # 0.1 against 0.6: right by both
        ("b", ["c", "a"], 1),  # wrong by both
        ("b", ["c", "a"], 0),
    ]
    assert log("ab") < log("ab", "bc") / 2
    found = measure_accuracy(bigram, task(*rows))
    assert (found.acc, found.acc_norm, found.documents) == (0.6, 0.6, 5)
    assert found.acc_stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    only = measure_accuracy(bigram, task(*rows[:1]))
    assert (only.acc, only.acc_norm, only.acc_stderr) == (1.0, 0.0, math.inf)


def test_characters_count_not_tokens_or_bytes() -> None:
    """The second choice has two characters, but three tokens and three bytes, by which it would lead."""
    table = torch.full((5, 5), 0.2, dtype=torch.float64)
    table[0] = torch.tensor([0.1, 0.3, 0.4, 0.1, 0.1])
    table[2] = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.2])
    table[3] = torch.tensor([0.25, 0.15, 0.15, 0.2, 0.25])
    words = {"?": [0], "?a": [0, 1], "?éa": [0, 2, 3, 4]}
    made = lay_out([Question("?", ("a", "éa"), 0)], words.__getitem__)

    def model(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return table.log()[tokens.flatten()[at]]

    one, other = score_choices(model, made)[0]
    assert [one, other] == pytest.approx([math.log(0.3), math.log(0.4 * 0.5 * 0.25)], rel=CLOSE)
    assert other / 3 > one > other / 2
    assert measure_accuracy(model, made).acc_norm == 1.0


def test_of_equal_choices_the_first_counts() -> None:
    rows = [("b", ["a", "a"], 0), ("b", ["a", "a"], 1), ("b", ["a", "c", "c"], 1), ("b", ["a", "c", "c"], 2)]
    found = measure_accuracy(bigram, task(*rows))
    assert found.acc == found.acc_norm == 0.5


@pytest.mark.parametrize("begin", [(), (0,)])
def test_a_choice_that_joins_the_context(begin: tuple[int, ...]) -> None:
    made = task(("ca", ["b", "c", "bc"], 0), encode=merging, begin=begin)
    assert score_choices(bigram, made)[0] == pytest.approx([log("cX"), log("ac"), log("cX", "Xc")], rel=CLOSE)


def test_white_space_at_the_end_of_the_context_is_scored_with_the_choice() -> None:
    letters = "ab _"  # "_" is a space and what follows it

    def tokens(text: str) -> list[int]:
        return [letters.index(letter) for letter in text.replace(" b", "_")]

    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log().expand(4, 4)
    rows = [Question("a ", ("b", "a"), 0), Question("a", (" b", " a"), 0)]
    found = score_choices(lambda batch, at: logits[batch.flatten()[at]], lay_out(rows, tokens))
    assert found[0] == found[1] == pytest.approx([math.log(0.4), math.log(0.3) + math.log(0.1)], rel=CLOSE)


def test_a_text_begins_with_what_the_tokenizer_puts_there() -> None:
    assert score_choices(bigram, task(("", ["a", "bc"], 0), begin=[0]))[0] == pytest.approx(
        [log(".a"), log(".b", "bc")], rel=CLOSE
    )
    assert score_choices(bigram, task(("", ["a", "bc"], 0), first=0))[0] == pytest.approx(
        [log(".a"), log(".b", "bc")], rel=CLOSE
    )
    assert torch.equal(task(("a", ["b", "c"], 0), begin=[0]).batches[0].tokens[0, :2], torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="question 1, choice 'a': has no context, and the tokenizer has no token"):
        task(("", ["a", "bc"], 0))


def test_batches_and_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lengths in batches of several sizes: each score is that of the question alone."""
    generator = torch.Generator().manual_seed(0)

    def word(length: int) -> str:
        return "".join(LETTERS[i] for i in torch.randint(1, 4, (length,), generator=generator).tolist())

    rows = [(word(1 + 3 * k % 40), [word(1 + k % 5) for _ in range(2 + k % 3)], 0) for k in range(40)]
    alone = [score_choices(bigram, task(row))[0] for row in rows]
    for tokens, multiple in ((512, 8), (16, 1), (64, 3)):
        monkeypatch.setattr(choices, "BATCH_TOKENS", tokens)
        monkeypatch.setattr(choices, "ROUND", multiple)
        made = task(*rows)
        assert all(batch.tokens.numel() <= max(tokens, batch.tokens.shape[1]) for batch in made.batches)
        assert score_choices(bigram, made) == alone
    for scores, (context, words, _) in zip(alone, rows, strict=True):
        for score, own in zip(scores, words, strict=True):
            whole = context + own
            steps = [whole[k - 1 : k + 1] for k in range(len(context), len(whole))]
            assert score == pytest.approx(log(*steps), rel=CLOSE)


def test_a_choice_within_another_needs_no_row() -> None:
    made = task(("ca", ["b", "c", "bc", "bca"], 0))
    assert [batch.tokens.shape[0] for batch in made.batches] == [1], "all of them read c, a, b, c at most"
    assert len(task(("ca", ["bb", "cc"], 0)).batches[0].tokens) == 2


def test_what_is_too_long_loses_its_begin() -> None:
    made = task(("abcabc", ["ab", "b"], 0), limit=3)
    assert sorted(row.tolist() for batch in made.batches for row in batch.tokens) == [encode("abc"), encode("bca")]
    assert score_choices(bigram, made)[0] == pytest.approx([log("ca", "ab"), log("cb")], rel=CLOSE)
    with pytest.raises(UsageError, match="choice 'abca': has 4 tokens, too many for a model with a context of 3"):
        task(("abcabc", ["b", "abca"], 0), limit=3)
    assert len(task(("abcabc", ["b", "abc"], 0), limit=3).batches) == 1


def test_what_cannot_be_asked_is_refused() -> None:
    for wrong in ((), ("a",), ("a", "")):
        with pytest.raises(UsageError, match="two choices or more, none of them empty"):
            Question("x", wrong, 0)
    for answer in (-1, 2):
        with pytest.raises(UsageError, match=f"answer={answer}: must be the index of one of the 2 choices"):
            Question("x", ("a", "b"), answer)
    with pytest.raises(UsageError, match="there are no questions"):
        lay_out([], encode)
    with pytest.raises(UsageError, match="question 1, choice '!': adds no token to its context"):
        lay_out([Question("a", ("b", "!"), 0)], lambda text: encode(text.replace("!", "")))


def test_logits_that_are_not_finite_are_an_error() -> None:
    made = task(("ca", ["b", "c"], 0))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NumericsError, match="not finite"):
            measure_accuracy(lambda tokens, at, bad=bad: torch.full((len(at), 5), bad), made)
