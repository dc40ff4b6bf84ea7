"""Text from tokens: whole characters only, and nothing of a stop string."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import UsageError
from bitpress.runtime.detokenizer import Detokenizer, check_stop, text_decoder


def pieces_of(detokenizer: Detokenizer, tokens: Sequence[int]) -> Iterator[str]:
    for token in tokens:
        yield detokenizer.add(token)
        if detokenizer.stopped:
            return
    yield detokenizer.end()


@pytest.fixture(scope="module")
def by_bytes(tiny_tokenizer: Any) -> Any:
    return tiny_tokenizer


@pytest.fixture(scope="module")
def by_fallback() -> Any:
    """A tokenizer of SentencePiece's kind: words with their space in front, other characters as bytes, all of a run or none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghij", *(f"▁{c}" for c in "abcdefghij")]
    merges = [("▁", c) for c in "abcdefghij"]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<s>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


# Characters of one to four bytes, more of them than a tokenizer of 384 tokens has; no line breaks, which pieces do not care about.
TEXT = st.text(st.sampled_from("abc def.é😀中文🇩🇪\u00ad"), max_size=30)


@pytest.mark.parametrize("kind", ["by_bytes", "by_fallback"])
def test_pieces_are_whole_characters_and_together_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    decode = text_decoder(tokenizer)

    @given(TEXT)
    @settings(max_examples=200, deadline=None, derandomize=True)
    def check(text: str) -> None:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        made = list(pieces_of(Detokenizer(decode), tokens))
        assert "".join(made) == decode(tokens)
        assert not any("\ufffd" in piece for piece in made)

    check()
    assert len(tokenizer("😀", add_special_tokens=False)["input_ids"]) >= 4, "characters of several tokens are what is tested"


def test_text_comes_as_early_as_it_is_settled(by_bytes: Any) -> None:
    tokens = by_bytes("a😀b", add_special_tokens=False)["input_ids"]
    made = list(pieces_of(Detokenizer(text_decoder(by_bytes)), tokens))
    assert [piece for piece in made if piece] == ["a", "😀", "b"]
    assert made[0] == "a", "a character that is whole does not wait for the next one"


def test_a_character_that_never_ends_shows_as_such(by_bytes: Any) -> None:
    tokens = by_bytes("a😀", add_special_tokens=False)["input_ids"][:-1]
    assert list(pieces_of(Detokenizer(text_decoder(by_bytes)), tokens))[-1] == "\ufffd"
    tokens += by_bytes("b", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(Detokenizer(text_decoder(by_bytes)), tokens)) == "a\ufffdb"


def test_special_tokens_and_tokens_beyond_the_tokenizer_have_no_text(by_bytes: Any) -> None:
    a, b = by_bytes("ab", add_special_tokens=False)["input_ids"]
    made = list(pieces_of(Detokenizer(text_decoder(by_bytes)), [a, by_bytes.bos_token_id, by_bytes.eos_token_id, 100_000, b]))
    assert made == ["a", "", "", "", "b", ""]


def test_a_space_in_front_is_kept_between_words(by_fallback: Any) -> None:
    tokens = by_fallback("ab cd", add_special_tokens=False)["input_ids"]
    tokens.insert(len(tokens) // 2, by_fallback.bos_token_id)
    assert "".join(pieces_of(Detokenizer(text_decoder(by_fallback)), tokens)) == "ab cd"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_text_ends_before_the_first_stop_string_that_appears(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(lambda tokens: "".join(map(chr, tokens)), stop)
    made, shown = list(pieces_of(detokenizer, [ord(c) for c in text])), ""
    ends = [
        min(text[:n].find(s) for s in stop if s in text[:n]) for n in range(len(text) + 1) if any(s in text[:n] for s in stop)
    ]
    expected = text[: ends[0]] if ends else text
    assert "".join(made) == expected
    assert detokenizer.stopped == bool(ends)
    for piece in made:  # what is shown is never taken back
        shown += piece
        assert expected.startswith(shown)


def test_text_without_a_beginning_of_a_stop_string_does_not_wait() -> None:
    detokenizer = Detokenizer(lambda tokens: "".join(map(chr, tokens)), ["xyz"])
    assert [detokenizer.add(ord(c)) for c in "abxaxyb"] == ["a", "b", "", "xa", "", "", "xyb"]


@pytest.mark.parametrize("stop", ["abc", ["a", ""]])
def test_stop_strings_that_are_none(stop: Any) -> None:
    with pytest.raises(UsageError, match="not empty"):
        Detokenizer(str, stop)
    with pytest.raises(UsageError, match="not empty"):
        check_stop(stop)
