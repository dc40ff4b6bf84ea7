"""Generated texts: both models' own greedy tokens, divided where they first differ."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.measure import continuations
from bitpress.measure.continuations import continue_texts, place_difference
from bitpress.measure.runtimes import choose_opened, native_runtime, transformers_runtime
from bitpress.measure.samples import draw_evaluation
from bitpress.models.opening import open_streamed
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.detokenizer import text_decoder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that the native engine runs, and one that transformers runs, in two bits."""
    source, out = tiny_model(request.param), tmp_path_factory.mktemp("continued") / "out"
    quantize_directory(source, out, make_recipe({"weights": "int2-g16", "quantizer": {"name": "rtn"}}), proof=Proof(tokens=0))
    return source, out


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Take the most likely token again and again, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def run(source: Path, out: Path, text: Path) -> Any:
    checkpoint = CompressedCheckpoint.open(out)
    runtime = native_runtime(checkpoint) if choose_opened(checkpoint) == "native" else transformers_runtime(checkpoint)
    original = open_streamed(source, torch.float32)
    original.load_outer_()
    samples, _ = draw_evaluation(str(text), original.task, source, original.model.config, count=256, length=64)
    return continue_texts(original, checkpoint, runtime, samples), samples, original


def test_the_texts_are_those_of_both_models(both: tuple[Path, Path], text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    source, out = both
    monkeypatch.setattr(continuations, "NEW_TOKENS", 6)
    found, samples, original = run(source, out, text_file)
    assert (found.omitted, found.tokens, len(found.texts)) == (None, 6, 3)
    decode = text_decoder(load_tokenizer(source))
    models = AutoModelForCausalLM.from_pretrained(source), bitpress.load(out)
    for text, window in zip(found.texts, samples.inputs, strict=False):
        prompt = window[: continuations.PROMPT_LENGTH].tolist()
        texts = [text.shared + ("" if e is None else e.token + e.rest) for e in (text.original, text.compressed)]
        tokens = greedy(models[0], prompt, 6)
        assert text.prompt + texts[0] == decode(prompt + tokens), "the original's is exact"
        if found.runtime == "transformers":
            assert text.prompt + texts[1] == decode(prompt + greedy(models[1], prompt, 6))
    assert all(p.is_meta for block in original.blocks for p in block.parameters()), "its blocks are dropped again"


def test_what_does_not_fit_into_memory_is_omitted_with_the_reason(
    both: tuple[Path, Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(continuations, "psutil", full)
    found, _, _ = run(*both, text_file)
    assert found.texts == []
    assert found.omitted is not None
    assert "twice as many must be free, and 1,000 are" in found.omitted


def test_a_model_that_does_not_generate_stops_nothing(
    both: tuple[Path, Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr(continuations, "_by_model", broken)
    found, _, _ = run(*both, text_file)
    assert (found.texts, found.omitted) == ([], "the model does not generate here: no cache of this kind")


LETTERS = {0: "a", 1: "b", 2: "c", 3: " d", 4: "\ufffd", 5: "\ufffd"}


def decode(tokens: list[int]) -> str:
    """Text of letters; 4 and 5 are the two halves of one character."""
    return "".join(LETTERS[token] for token in tokens).replace("\ufffd\ufffd", "é")


@pytest.mark.parametrize(
    ("original", "compressed", "shared", "ends"),
    [
        ([0, 1, 2], [0, 1, 2], ("abc", 3), (None, None)),
        ([0, 1, 2], [0, 3, 1], ("a", 1), (("b", "c"), (" d", "b"))),
        ([1, 1], [2, 1], ("", 0), (("b", "b"), ("c", "b"))),
        ([0, 1], [0], ("a", 1), (("b", ""), None)),
        ([], [], ("", 0), (None, None)),
        ([0, 4, 5, 1], [0, 2, 1], ("a", 1), (("é", "b"), ("c", "b"))),
        ([0, 4, 5, 1], [0, 4, 4], ("a", 2), (("é", "b"), ("é", ""))),
    ],
)
def test_texts_are_divided_at_the_first_token_that_differs(
    original: list[int], compressed: list[int], shared: tuple[str, int], ends: tuple[Any, Any]
) -> None:
    found = place_difference("kind", [3, 0], original, compressed, decode)
    assert (found.prompt, found.shared, found.shared_tokens) == (" da", *shared)
    got = [None if end is None else (end.token, end.rest) for end in (found.original, found.compressed)]
    assert got == list(ends)
