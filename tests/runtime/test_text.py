"""Text from tokens: whole characters only, stop strings, end tokens, figures; and the engine that makes it."""

import io
from collections.abc import Callable
from logging import StreamHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bitpress
from bitpress import native
from bitpress.errors import CheckpointError, UsageError
from bitpress.runtime.detokenizer import text_decoder
from bitpress.runtime.native.text import TextEngine
from bitpress.runtime.prompt import check_prompt, encode_prompt, end_tokens, read_generation_file
from bitpress.runtime.sampling import LIMITS, Sampling, SamplingRequest

PROMPT = "The sea was calm, and the"
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")


# ---- what the model's files say ----


def config(**values: Any) -> Any:
    text = SimpleNamespace(vocab_size=384, max_position_embeddings=64, **values)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("generation", "own", "tokenizer", "expected"),
    [
        ([3, 4], 1, 2, (3, 4)),
        (3, 1, 2, (3,)),
        (None, [1], 2, (1,)),
        (None, None, 2, (2,)),
        (None, None, None, ()),
    ],
)
def test_end_tokens(generation: Any, own: Any, tokenizer: Any, expected: tuple[int, ...]) -> None:
    owners = [SimpleNamespace(eos_token_id=value) for value in (generation, tokenizer)]
    assert end_tokens(owners[0], config(eos_token_id=own), owners[1]) == expected
    assert end_tokens(None, config(eos_token_id=own), owners[1]) == expected or generation is not None


@pytest.mark.parametrize("value", ["</s>", [1, "x"], True, 1.0])
def test_end_tokens_that_are_none(value: Any) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id"):
        end_tokens(SimpleNamespace(eos_token_id=value), config())


def test_the_models_sampling_applies_at_a_temperature_and_gives_way() -> None:
    own = SimpleNamespace(top_k=7, top_p=0.9, min_p=None, repetition_penalty=1.1)
    assert SamplingRequest().resolve(own) == Sampling()
    assert SamplingRequest(0.5, 3).resolve(own) == Sampling(0.5, 7, 0.9, 0.0, 1.1, 3)
    assert SamplingRequest(0.5, top_k=0, top_p=None, min_p=0.1).resolve(own) == Sampling(0.5, 0, 0.9, 0.1, 1.1)
    assert SamplingRequest(repetition_penalty=1.3).resolve(own) == Sampling(repetition_penalty=1.3)
    assert SamplingRequest(1.0).resolve(None) == Sampling(1.0)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"top_k": 3}, "top_k changes nothing at temperature 0"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1, "min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_sampling_that_cannot_be(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SamplingRequest(**settings_)


def test_sampling_of_the_file_that_cannot_be() -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_p is 'much'"):
        SamplingRequest(1.0).resolve(SimpleNamespace(top_p="much"))


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("bad", ["much", -3, float("nan"), True, [1]])
def test_a_bad_value_of_the_file_stops_nobody_who_gives_another(name: str, bad: Any) -> None:
    own = SimpleNamespace(**{name: bad})
    with pytest.raises(CheckpointError, match=f"generation_config.json: {name} is"):
        SamplingRequest(1.0).resolve(own)
    assert getattr(SamplingRequest(1.0, **{name: 1}).resolve(own), name) == 1
    assert SamplingRequest().resolve(own) == Sampling(), "greedy text looks at none of them"


def test_prompts(tiny_tokenizer: Any) -> None:
    plain = tiny_tokenizer("ab", add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "ab"}]
    assert encode_prompt(tiny_tokenizer, "ab", raw=True) == plain
    assert encode_prompt(tiny_tokenizer, "ab") == encode_prompt(tiny_tokenizer, messages) != plain
    for prompt, says in (("", "empty"), ([], "empty"), ("\udcff", "UTF-8")):
        with pytest.raises(UsageError, match=says):
            encode_prompt(tiny_tokenizer, prompt)
    with pytest.raises(UsageError, match="chat template"):
        encode_prompt(tiny_tokenizer, messages * 2, raw=True)
    assert check_prompt([1] * 60, config(), 64) == 4
    assert check_prompt([1], config(), None) > 2**30
    with pytest.raises(UsageError, match="larger context"):
        check_prompt([1] * 9, config(), 8)
    with pytest.raises(UsageError, match="no tokens"):
        check_prompt([], config(), 8)
    with pytest.raises(CheckpointError, match="do not belong together"):
        check_prompt([384], config(), 8)


# ---- the engine ----


@pytest.fixture(scope="module")
def engine(pressed_original: Path) -> TextEngine:
    made = bitpress.load(pressed_original, runtime="native", threads=1)
    assert isinstance(made, TextEngine)
    return made


@needs_native
def test_a_stream_is_its_result(engine: TextEngine) -> None:
    stream = engine.stream(PROMPT, max_tokens=12)
    with pytest.raises(UsageError, match="has not ended"):
        _ = stream.result
    made = list(stream)
    answer = stream.result
    assert "".join(made) == answer.text == text_decoder(engine.tokenizer)(list(answer.token_ids))
    assert len(answer.token_ids) == answer.tokens <= 12
    assert answer.prompt_tokens == len(engine.encode(PROMPT))
    assert answer.tokens_per_second > 0
    assert answer.prefill_tokens_per_second > 0
    assert list(stream) == []


@needs_native
def test_the_tokens_are_the_engines_own(engine: TextEngine) -> None:
    tokens = engine.encode(PROMPT, raw=True)
    answer = engine.complete(PROMPT, max_tokens=8, raw=True)
    engine.engine.reset()
    assert list(answer.token_ids) == list(engine.engine.generate(tokens, max_tokens=8))
    how = engine.sampling(1.5, 7, top_k=50)
    drawn = engine.complete(PROMPT, max_tokens=8, raw=True, sampling=how)
    assert drawn.token_ids == engine.complete(PROMPT, max_tokens=8, raw=True, sampling=how).token_ids
    assert drawn.token_ids != answer.token_ids


def with_end_token(engine: TextEngine, token: int) -> TextEngine:
    other = TextEngine(engine.engine, lambda: engine.tokenizer, engine.generation)
    other.generation = SimpleNamespace(eos_token_id=[token])
    return other


@needs_native
def test_every_reason_to_finish(engine: TextEngine, pressed_original: Path) -> None:
    free = engine.complete(PROMPT, max_tokens=6)
    assert (free.finish, free.tokens) == ("length", 6)
    how = Sampling(temperature=3.0, seed=1)
    drawn = engine.complete(PROMPT, max_tokens=20, sampling=how).token_ids
    at = next(i for i in range(2, 20) if drawn[i] not in drawn[:i])
    ended = with_end_token(engine, drawn[at]).complete(PROMPT, max_tokens=20, sampling=how)
    assert (ended.finish, ended.token_ids) == ("stop", drawn[:at])
    cut = engine.complete(PROMPT, max_tokens=6, stop=["\0", free.text[2:4]])
    assert cut.finish == "stop"
    assert cut.text == free.text[: free.text.index(free.text[2:4])]
    count = len(engine.encode(PROMPT))
    small = bitpress.load(pressed_original, runtime="native", context=count + 3)
    full = small.complete(PROMPT, max_tokens=20)
    assert (full.finish, full.tokens) == ("context", 3)
    assert small.complete(PROMPT, max_tokens=3).finish == "length"
    with pytest.raises(UsageError, match="larger context"):
        small.complete(PROMPT * 2)
    with pytest.raises(UsageError, match="max_tokens=0"):
        small.complete(PROMPT, max_tokens=0)


@needs_native
def test_a_conversation_keeps_its_cache(engine: TextEngine) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    first = engine.complete(messages, max_tokens=4)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}]
    tokens = engine.encode(messages)
    shared = engine.engine.common(tokens)
    assert first.prompt_tokens - 2 <= shared < len(tokens)
    second = engine.complete(messages, max_tokens=4)
    engine.engine.reset()
    assert engine.engine.common(tokens) == 0
    assert engine.complete(messages, max_tokens=4).token_ids == second.token_ids


@needs_native
def test_the_cache_is_what_was_run_last(engine: TextEngine) -> None:
    """Tokens that went in beside `generate` count too."""
    text = list(range(10, 30))
    fresh = list(engine.engine.generate(text, max_tokens=4))
    engine.engine.reset()
    engine.engine.forward([50] * 25)
    assert engine.engine.common(text) == 0
    assert list(engine.engine.generate(text, max_tokens=4)) == fresh


@needs_native
def test_a_directory_without_a_tokenizer_runs_tokens(
    tiny_model: Callable[..., Path], tmp_path: Path, gptq_recipe: Callable[..., Any]
) -> None:
    import shutil

    from bitpress.pipeline.quantize import Proof, quantize_directory

    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    recipe = gptq_recipe(quantizer={"name": "rtn"})
    quantize_directory(source, tmp_path / "out", recipe, proof=Proof(tokens=0))
    engine = bitpress.load(tmp_path / "out", runtime="native")
    assert len(list(engine.engine.generate([5, 6, 7], max_tokens=3))) == 3
    with pytest.raises(CheckpointError, match="no tokenizer"):
        engine.complete("a")


@needs_native
@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_sampling_are_those_of_the_library(name: str) -> None:
    limit, built = LIMITS[name], native.library()
    usual = Sampling()
    order = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert set(order) == set(LIMITS)

    def takes(value: Any) -> bool:
        try:
            built.Sampling(*(value if other == name else getattr(usual, other) for other in order))
        except ValueError:
            return False
        return True

    step = 1 if limit.whole else 0.001
    ends = [limit.least - step, limit.least, limit.least + step]
    for value in [*ends, limit.most, limit.most + step] if limit.most <= 1 else ends:
        assert takes(value) == (limit.refusal(value) is None), value


def test_settings_of_sampling_are_read_without_a_remark(tmp_path: Path) -> None:
    from transformers import GenerationConfig
    from transformers.utils import logging

    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "typical_p": 0.9}')
    said = io.StringIO()
    handler, logger = StreamHandler(said), logging.get_logger("transformers.generation.configuration_utils")
    logger.addHandler(handler)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        logger.warning_once.cache_clear()
        assert read_generation_file(tmp_path / "generation_config.json").temperature == 0.6
        assert said.getvalue() == "", "they apply at a temperature above 0"
        logger.warning_once.cache_clear()
        GenerationConfig(temperature=0.6, typical_p=0.9)
        assert "temperature" in said.getvalue(), "transformers itself goes on remarking"
    finally:
        logger.removeHandler(handler)
        logging.set_verbosity(verbosity)
