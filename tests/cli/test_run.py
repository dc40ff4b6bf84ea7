"""`bitpress run`, `bench` and `inspect --machine`: which runtime, what it says, and what either of them refuses."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitpress import native
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.native import speed as speed
from bitpress.runtime.native.engine import Engine

ASK = ("--prompt", "The sea was calm, and the", "--max-tokens", "8")
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def gpt2(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "gpt2"
    recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn"}})
    quantize_directory(tiny_model("gpt2"), out, recipe, proof=Proof(tokens=0))
    return out


@pytest.fixture(scope="module")
def expanded(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in a format that has more than 16 bits a weight."""
    out = tmp_path_factory.mktemp("run") / "single"
    recipe = make_recipe({"weights": "int4-g1", "quantizer": {"name": "rtn"}})
    quantize_directory(tiny_model("llama"), out, recipe, proof=Proof(tokens=0))
    return out


# ---- run ----


@needs_native
def test_the_native_engine_is_used_and_said(bitpress: Run, pressed_original: Path) -> None:
    answer = bitpress("run", pressed_original, *ASK, "--threads", "1", "--json").json
    assert {"text", "tokens", "prompt_tokens", "tokens_per_second", "prefill_tokens_per_second", "finish"} <= set(answer)
    assert (answer["runtime"], answer["threads"], answer["activations"]) == ("native", 1, "int8")
    assert answer["path"] in native.code_paths()
    printed = bitpress("run", pressed_original, *ASK, "--threads", "1")
    assert printed.out == answer["text"] + "\n"
    assert printed.err.splitlines()[0] == f"native ({answer['path']}), 1 thread, 8-bit activations, head int8-row"
    assert "tokens/s" in printed.err.splitlines()[-1]


@needs_native
def test_options_of_the_native_engine(bitpress: Run, pressed_original: Path) -> None:
    given = ("--activations", "none", "--cache", "int8", "--head", "keep", "--context", "40", "--threads", "1")
    done = bitpress("run", pressed_original, *ASK, *given)
    assert f"native ({native.chosen_path()}), 1 thread, float activations, int8 cache, head float32" in done.err
    assert bitpress("run", pressed_original, *ASK[:2], *given, "--json").json["finish"] == "context"


@needs_native
def test_formats_that_are_expanded_are_named(bitpress: Run, expanded: Path) -> None:
    assert "expanded to 16 bits: int4-g1" in bitpress("run", expanded, *ASK).err


def test_transformers_where_the_engine_does_not_know_the_model(bitpress: Run, gpt2: Path) -> None:
    done = bitpress("run", gpt2, *ASK)
    assert done.err.startswith("transformers: ")
    assert "'gpt2' is not among" in done.err or not native.available()
    answer = bitpress("run", gpt2, *ASK, "--json").json
    assert answer["runtime"] == "transformers"
    assert done.out == answer["text"] + "\n"
    assert bitpress("run", gpt2, *ASK, "--packed", "--json").json["weights"] == "packed"


@pytest.mark.parametrize("settings", [(), ("--repetition-penalty", "1.5"), ("--stop", "e", "--stop", "\0")])
def test_both_runtimes_answer_alike(settings: tuple[str, ...], bitpress: Run, pressed_original: Path) -> None:
    if not native.available():
        pytest.skip("no native library")
    exact = ("--activations", "none", "--head", "keep")
    ours = bitpress("run", pressed_original, *ASK, *settings, *exact, "--json").json
    theirs = bitpress("run", pressed_original, *ASK, *settings, "--runtime", "transformers", "--json").json
    assert {key: ours[key] for key in ("text", "tokens", "prompt_tokens", "finish")} == {
        key: theirs[key] for key in ("text", "tokens", "prompt_tokens", "finish")
    }
    if "--stop" in settings:
        assert "e" not in ours["text"]


@needs_native
def test_both_runtimes_follow_the_same_of_the_models_settings(
    tiny_model: Callable[..., Path], tmp_path: Path, bitpress: Run
) -> None:
    """Beams, n-grams and the like are of neither, and a value that the user replaces is not looked at."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), source)
    own = {"no_repeat_ngram_size": 1, "num_beams": 3, "stop_strings": ["a"], "max_length": 5, "min_length": 9}
    values = {**own, "do_sample": True, "top_p": "much", "eos_token_id": [1, 2], "suppress_tokens": [5, 6, 7]}
    (source / "generation_config.json").write_text(json.dumps(values))
    quantize_directory(source, out, make_recipe({"weights": "int8-g16", "quantizer": {"name": "rtn"}}), proof=Proof(tokens=0))
    exact = ("--runtime", "native", "--activations", "none", "--head", "keep")
    answers = [bitpress("run", out, *ASK, *options, "--json").json for options in (exact, ("--runtime", "transformers"))]
    assert answers[0]["text"] == answers[1]["text"]
    for options in (exact, ("--runtime", "transformers")):
        assert "top_p is 'much'" in bitpress("run", out, *ASK, *options, "--temperature", "1").error
        assert bitpress("run", out, *ASK, *options, "--temperature", "1", "--top-p", "0.9").code == 0


@pytest.mark.parametrize("runtime", ["native", "transformers"])
def test_sampling_has_its_seed(runtime: str, bitpress: Run, pressed_original: Path) -> None:
    if not native.available() and runtime == "native":
        pytest.skip("no native library")
    given = (*ASK, "--temperature", "2", "--top-k", "100", "--top-p", "0.95", "--min-p", "0.001", "--runtime", runtime)
    answers = [bitpress("run", pressed_original, *given, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (
            ("--runtime", "transformers", "--cache", "int8"),
            2,
            "--cache: only for the runtime native, and transformers was requested",
        ),
        (("--packed", "--head", "keep"), 2, "--head: only for the runtime native; --packed: only for transformers"),
        (("--runtime", "native", "--packed"), 2, "--packed: only for the runtime transformers"),
        (("--runtime", "nativ"), 2, "Did you mean 'native'"),
        (("--top-k", "3"), 2, "top_k changes nothing at temperature 0"),
        (("--temperature", "1", "--top-p", "0"), 2, "top_p is 0.0"),
        (("--stop", ""), 2, "not empty"),
        (("--activations", "int4"), 2, "activations='int4'"),
        (("--head", "int4-g"), 2, "int4-g"),
        (("--context", "1000"), 2, "context=1000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@needs_native
def test_wrong_options_are_one_line(
    options: tuple[str, ...], code: int, says: str, bitpress: Run, pressed_original: Path
) -> None:
    done = bitpress("run", pressed_original, *ASK, *options)
    assert (done.code, done.out) == (code, "")
    assert says in done.error


@needs_native
def test_options_of_the_engine_where_it_does_not_know_the_model(bitpress: Run, gpt2: Path) -> None:
    done = bitpress("run", gpt2, *ASK, "--activations", "none")
    assert done.code == 2
    assert "--activations: only for the runtime native, which does not run this model: architecture 'gpt2'" in done.error
    assert "'gpt2'" in bitpress("run", gpt2, *ASK, "--runtime", "native").error


@needs_native
def test_an_interrupt_keeps_what_was_printed(bitpress: Run, pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*ASK[:3], "40", "--temperature", "2", "--seed", "3")
    whole = bitpress("run", pressed_original, *given).out
    generate = Engine.generate

    def stopped(self: Engine, *args: Any, **options: Any) -> Iterator[int]:
        for count, token in enumerate(generate(self, *args, **options)):
            if count == 20:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Engine, "generate", stopped)
    done = bitpress("run", pressed_original, *given)
    assert done.code == 130
    assert 1 < len(done.out) < len(whole)
    assert whole.startswith(done.out.removesuffix("\n"))
    assert "Traceback" not in done.err


# ---- bench, inspect --machine ----


@needs_native
@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_bench(what: str, bitpress: Run, pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ_BYTES", 1 << 22)
    given = ("bench", what, pressed_original, "--threads", "1", "--context", "20", "--tokens", "4", "--repeats", "2")
    facts = bitpress(*given, "--cache", "int8", "--json").json
    assert (facts["what"], facts["context"], facts["tokens"], facts["repeats"]) == (what, 20, 4, 2)
    assert (facts["cache"], facts["path"]) == ("int8", native.chosen_path())
    printed = bitpress(*given)
    assert printed.code == 0, printed.err
    assert "4 behind 20, 2 times" in printed.out
    assert "% of" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100


@needs_native
def test_bench_of_what_is_not_measured(bitpress: Run, pressed_original: Path, gpt2: Path) -> None:
    assert "Did you mean 'prefill'" in bitpress("bench", "prefil", pressed_original).error
    assert "'gpt2' is not among" in bitpress("bench", "decode", gpt2).error


def test_the_machine(bitpress: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.settings import usable_cores

    monkeypatch.delenv("BITPRESS_PATH", raising=False)
    facts = bitpress("inspect", "--machine", "--json").json
    assert facts["cores_usable"] == usable_cores()
    if native.available():
        assert facts["native"] == "there"
        assert facts["code_path"] == facts["code_paths"][0]
        monkeypatch.setenv("BITPRESS_PATH", "portable")
        assert bitpress("inspect", "--machine", "--json").json["code_path"] == "portable"
        monkeypatch.setenv("BITPRESS_PATH", "sse")
        assert "'sse' is not there" in bitpress("inspect", "--machine").error
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    facts = bitpress("inspect", "--machine", "--json").json
    assert "BITPRESS_NATIVE=off" in facts["native"]
    assert (facts["code_paths"], facts["code_path"]) == ([], None)
    assert "none" in bitpress("inspect", "--machine").out
