"""Bad input, wrong order, too little room: one clear line on standard error, the documented exit code, nothing left that loads."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpress.checkpoints.compressed import JOB_DIRECTORY, CompressedCheckpoint
from bitpress.checkpoints.safetensors_file import read_header, read_tensor, serialize
from bitpress.cli import app as cli
from bitpress.errors import CheckpointError, JobStopped, UsageError

RTN = ("--weights", "int4-g16", "--quantizer", "rtn", "--proof-tokens", "0")


Run = Callable[..., Any]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", tie_word_embeddings=True)


def check_nothing_loads(out: Path) -> None:
    with pytest.raises(CheckpointError):
        CompressedCheckpoint.open(out)


def change_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = model / "model.safetensors"
    held = {n: read_tensor(path, e) for n, e in read_header(path)[0].items()}
    held[name] = change(held[name])
    path.write_bytes(b"".join(bytes(part) for part in serialize(held, {"format": "pt"})))


# ----------------------------------------------------------------------------------------------------------------------- MODEL


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "MISSING", "OUT"),
        ("plan", "MISSING"),
        ("eval", "MISSING", "--against", "MODEL"),
        ("eval", "MODEL", "--against", "MISSING"),
        ("run", "MISSING", "--prompt", "x"),
        ("inspect", "MISSING"),
        ("verify", "MISSING"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["nothing", "file", "empty file", "empty directory", "directory of something else"])
def test_what_is_no_model_is_refused(
    command: tuple[str, ...], kind: str, bitpress: Run, llama: Path, tmp_path: Path, out: Path
) -> None:
    missing = tmp_path / "no-model"
    if kind.endswith("file"):
        missing.write_text("" if kind.startswith("empty") else "not a model\n")
    elif kind != "nothing":
        missing.mkdir()
        if "else" in kind:
            (missing / "notes.txt").write_text("nothing to see")
    places = {"MISSING": missing, "OUT": out, "MODEL": llama}
    done = bitpress(*(places.get(word, word) for word in command))
    assert done.code == 3, done.err
    assert str(missing) in done.error
    assert not out.exists()
    assert done.out == ""


def test_a_directory_without_a_model_says_what_to_write(bitpress: Run, tmp_path: Path, out: Path) -> None:
    done = bitpress("quantize", tmp_path, out, *RTN)
    assert "holds no config.json, so it is no model; MODEL is a directory with config.json" in done.error
    (tmp_path / "a.Q4_0.gguf").write_bytes(b"GGUF")
    done = bitpress("quantize", tmp_path, out, *RTN)
    assert f"write the file itself: {tmp_path / 'a.Q4_0.gguf'}" in done.error


def test_a_model_that_is_quantized_already_is_refused(bitpress: Run, pressed_original: Path, out: Path) -> None:
    done = bitpress("quantize", pressed_original, out, *RTN)
    assert done.code == 2
    assert "is quantized already (bitpress, 5.12 bits a weight)" in done.error
    assert "--requantize" in done.error
    assert not out.exists()


def test_pickled_weights_are_not_opened(bitpress: Run, llama: Path, tmp_path: Path, out: Path) -> None:
    model = tmp_path / "pickled"
    shutil.copytree(llama, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    done = bitpress("quantize", model, out, *RTN)
    assert done.code == 3
    assert "pickled" in done.error
    assert not out.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, bitpress: Run, llama: Path, tmp_path: Path, out: Path) -> None:
    model, name = tmp_path / "sick", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(llama, model)
    change_tensor(model, name, lambda t: t.index_fill(0, torch.tensor([3]), value))
    done = bitpress("quantize", model, out, *RTN)
    assert done.code == 6
    assert name in done.error
    check_nothing_loads(out)


def test_a_tensor_too_few_and_one_too_many_are_named(bitpress: Run, llama: Path, tmp_path: Path, out: Path) -> None:
    model = tmp_path / "odd"
    shutil.copytree(llama, model)
    path = model / "model.safetensors"
    held = {n: read_tensor(path, e) for n, e in read_header(path)[0].items()}
    kept = held.pop("model.layers.1.mlp.up_proj.weight")
    path.write_bytes(b"".join(bytes(part) for part in serialize(held)))
    done = bitpress("quantize", model, out, *RTN)
    assert (done.code, "model.layers.1.mlp.up_proj.weight" in done.error) == (3, True)
    path.write_bytes(b"".join(bytes(p) for p in serialize({**held, "model.layers.1.mlp.up_proj.weight": kept, "more": kept})))
    done = bitpress("quantize", model, out, *RTN)
    assert (done.code, "'more'" in done.error) == (3, True)
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--weights", "imt4-g64"), "unknown number grid 'imt4'. Did you mean 'int4'?"),
        (("--weights", "int4-g64-zerro"), "Did you mean 'zero'?"),
        (("--weights", "int4"), "names no block"),
        (("--weights", "int4-h64"), "'h64' is no block"),
        (("--weights", "int4-g0"), "'g0' is no block"),
        (("--quantizer", "gtpq"), "unknown quantizer 'gtpq'. Did you mean 'gptq'?"),
        (("--set", "quantizer.dammp=0.1"), "unknown setting of quantizer 'gptq' 'dammp'. Did you mean 'damp'?"),
        (("--set", "quantizer.damp=much"), "damp"),
        (("--set", "quantizer.damp=-1"), "damp"),
        (("--set", "weigths=int4-g32"), "Did you mean 'weights'?"),
        (("--set", "batch=0"), "batch"),
        (("--set", "compute=fp8"), "compute"),
        (("--set", "batch"), "write KEY=VALUE"),
        (("--set", "=1"), "write KEY=VALUE"),
        (("--set", "batch.more=1"), "batch"),
        (("--set", "batch=[1"), "not a YAML value"),
        (("--samples", "0"), "samples"),
        (("--length", "1"), "length"),
        (("--seed", "-1"), "seed"),
        (("--proof-tokens", "-1"), "the proof needs"),
        (("--set", "calibration.sample=4"), "Did you mean 'samples'?"),
        (("--set", "calibration.inputs=orig"), "Did you mean 'original'?"),
        (("--set", "quantizer.order=activations"), "Did you mean 'activation'?"),
        (("--set", "quantizer.steps=10000000000"), "steps from 2 to 10000"),
        (("--set", "weights.bits=4"), "weights: a text is needed"),
        (("--set", "skip=*.v_proj"), "skip: a list is needed"),
        (("--weights", "q4_k_m"), "nearest here: weights q4_k"),
        (("--weights", "AWQ"), "nearest here: weights int4-g128-zero with quantizer awq"),
        (("--weights", ""), "--weights: its value is empty"),
        (("--quantizer", "W4A16"), "nearest here: weights int4-g128"),
        (("--quantizer", "lqer"), "that is a correction"),
        (("--quantizer", "=gptq"), "Did you mean 'gptq'?"),
        (("--recipe", "4.0bpw"), "nearest here: weights int4-g64-zero"),
        (("--recipe", "best"), "That is a preset"),
        (("--recipe", ""), "--recipe: its value is empty"),
        (("--recipe", "FOLDER/nested.yaml"), "nested too deeply"),
        (("--recipe", "FOLDER/tabs.yaml"), "is not YAML"),
        (("--recipe", "FOLDER/twice.yaml"), "the key 'weights' is given twice"),
        (("--recipe", "FOLDER/empty.yaml"), "is a mapping"),
        (("--skip", "*.vproj"), "did you mean *.v_proj?"),
        (("--skip", "!*.vproj", "--skip", "*.v_proj"), "did you mean !*.v_proj?"),
        (("--skip", ""), "--skip: its value is empty"),
        (("--set", "overrides=[{match: '*.vproj', weights: int8-row}]"), "did you mean *.v_proj?"),
        (("--bits", "9"), "it has 5, 4, 3, 2"),
        (("--bits", "-4"), "it has 5, 4, 3, 2"),
        (("--bits", "4", "--weights", "int4-g32"), "leave one of them out"),
        (("--max-kl", "nan"), "max_kl=nan"),
        (("--max-kl", "-1"), "max_kl=-1"),
        (("--max-kl", "0.1", "--proof-tokens", "0"), "needs the proof"),
        (("--bits", "4", "--explain", "--quantizer", "gptq"), "--quantizer would change that recipe"),
        (("--proof-text", "FOLDER"), "unknown text"),
        (("--recipe", "FOLDER/missing.yaml"), "No such file"),
        (("--recipe", "FOLDER/broken.yaml"), "is not YAML"),
        (("--recipe", "FOLDER/list.yaml"), "is a mapping"),
        (("--recipe", "FOLDER/binary.yaml"), "is not YAML"),
        (("--recipe", "FOLDER/key.yaml"), "Did you mean 'quantizer'?"),
        (("--recipe", "FOLDER/inner.yaml"), "samplez"),
        (("--recipe", "FOLDER/type.yaml"), "skip"),
        (("--recipe", "FOLDER"), "directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_named(
    options: tuple[str, ...], says: str, bitpress: Run, llama: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("weights: [int4\nquantizer: {")
    (tmp_path / "list.yaml").write_text("- weights\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "key.yaml").write_text("quantiser: gptq\n")
    (tmp_path / "inner.yaml").write_text("calibration: {samplez: 4}\n")
    (tmp_path / "type.yaml").write_text("skip: 4\n")
    (tmp_path / "nested.yaml").write_text("[" * 5000)
    (tmp_path / "tabs.yaml").write_text("weights:\tint4-g32\n\tbatch: 1\n")
    (tmp_path / "twice.yaml").write_text("weights: int4-g32\nweights: int3-g32\n")
    (tmp_path / "empty.yaml").write_text("")
    usual = () if {"--weights", "--recipe", "--bits"} & set(options) else ("--weights", "int4-g16")
    done = bitpress("quantize", llama, out, *usual, *(word.replace("FOLDER", str(tmp_path)) for word in options))
    assert done.code == 2, done.err
    assert says in done.error
    assert len(done.error.replace(str(tmp_path), "")) <= 3 * 80, "three lines of a terminal"
    assert "Input should" not in done.error
    assert not out.exists()


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_group_that_does_not_fit_names_layers_and_groups(command: str, bitpress: Run, llama: Path, out: Path) -> None:
    places = [llama, out] if command == "quantize" else [llama]
    done = bitpress(command, *places, "--weights", "int4-g24", "--quantizer", "rtn")
    assert done.code == 2
    assert "in_features=32 is not a multiple of 24; blocks that fit: g32, g16, row" in done.error
    assert "model.layers.0.self_attn.q_proj" in done.error
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("", "holds no text"),
        (" \n \n", "holds no text"),
        ("Too short.", "are needed"),
        (b"\xff\xfe\xfd", "is not UTF-8"),
    ],
    ids=["missing", "empty", "blank", "short", "binary"],
)
def test_calibration_text_that_does_not_do(
    content: str | bytes | None, says: str, bitpress: Run, llama: Path, tmp_path: Path, out: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = bitpress("quantize", llama, out, "--weights", "int4-g32", "--calibration", text, "--samples", "4", "--length", "32")
    assert done.code == 2
    assert says in done.error
    assert not out.exists()


def test_windows_beyond_the_context_are_refused(bitpress: Run, llama: Path, text_file: Path, out: Path) -> None:
    done = bitpress("quantize", llama, out, "--weights", "int4-g32", "--calibration", text_file, "--length", "300")
    assert done.code == 2
    assert "256" in done.error
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------------------- OUT


def test_an_output_that_holds_something_else_is_left_alone(bitpress: Run, llama: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for force in ((), ("--force",)):
        done = bitpress("quantize", llama, out, *RTN, *force)
        assert done.code == 2
        assert "holds something else" in done.error
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_output_that_is_a_file_is_left_alone(bitpress: Run, llama: Path, out: Path) -> None:
    out.write_text("years of work")
    done = bitpress("quantize", llama, out, *RTN)
    assert done.code == 2
    assert "is a file" in done.error
    assert out.read_text() == "years of work"


def test_the_model_itself_is_no_output(bitpress: Run, llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    done = bitpress("quantize", model, model, *RTN, "--force")
    assert done.code == 2
    assert "holds something else" in done.error
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before


def test_a_second_writer_is_refused(bitpress: Run, llama: Path, out: Path) -> None:
    (out / JOB_DIRECTORY).mkdir(parents=True)
    with (out / JOB_DIRECTORY / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = bitpress("quantize", llama, out, *RTN)
        assert done.code == 2
        assert "another process works here; wait for it or stop it" in done.error
        check_nothing_loads(out)
    assert bitpress("quantize", llama, out, *RTN).code == 0, "the lock goes with who held it"


def test_a_job_folder_that_is_a_link_is_refused(bitpress: Run, llama: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    (out / JOB_DIRECTORY).symlink_to(tmp_path / "elsewhere")
    done = bitpress("quantize", llama, out, *RTN)
    assert done.code == 2
    assert "is a link" in done.error
    assert not list((tmp_path / "elsewhere").iterdir())


def test_too_little_disk_is_said_before_the_start(
    bitpress: Run, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, used=2**30 - 1000, free=1000))
    done = bitpress("quantize", llama, out, *RTN)
    assert done.code == 4
    assert "1,000 are free" in done.error
    assert not out.exists()


def test_too_little_memory_is_said_before_the_start(
    bitpress: Run, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2**30))
    done = bitpress("quantize", llama, out, *RTN)
    assert done.code == 5
    assert "of memory are needed" in done.error
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------------------- gates


def test_beyond_max_kl_nothing_is_published(bitpress: Run, llama: Path, text_file: Path, out: Path) -> None:
    proof = ("--proof-text", text_file, "--proof-tokens", "64")
    command = ("quantize", llama, out, "--weights", "int2-row", "--quantizer", "rtn", *proof)
    done = bitpress(*command, "--max-kl", "1e-9")
    assert done.code == 6
    assert "above --max-kl 1e-09; nothing is published" in done.error
    assert [path.name for path in out.iterdir()] == [JOB_DIRECTORY], "nothing looks like a model"
    check_nothing_loads(out)
    for words in (("run", out, "--prompt", "a"), ("eval", out), ("inspect", out)):
        assert "a job here is unfinished: run the same quantize command again" in bitpress(*words).error
    finished = (out / JOB_DIRECTORY / "journal.jsonl").read_bytes()
    done = bitpress(*command, "--max-kl", "1e-8")
    assert (done.code, (out / JOB_DIRECTORY / "journal.jsonl").read_bytes()) == (6, finished)
    assert "quantizing: " not in done.err, "the blocks are kept"
    done = bitpress(*command, "--max-kl", "1e9")
    assert done.code == 0, "the same run goes on when the limit is raised"
    CompressedCheckpoint.open(out)


def test_strict_makes_a_fallback_an_error(bitpress: Run, tiny_model: Callable[..., Path], text_file: Path, out: Path) -> None:
    calibration = ("--calibration", text_file, "--samples", "2", "--length", "16", "--proof-tokens", "0")
    command = ("quantize", tiny_model("mixtral"), out, "--weights", "int4-g32", "--set", "min_expert_tokens=1000", *calibration)
    done = bitpress(*command, "--strict")
    assert done.code == 6
    assert "fewer than 1000" in done.error
    assert "--strict" in done.error
    check_nothing_loads(out)
    done = bitpress(*command, "--json")
    assert done.code == 0, done.err
    fallbacks = json.loads(done.out)["fallbacks"]
    assert len(fallbacks) == 2 * 2 * 4, "gate_up and down of four experts in two blocks"


# ------------------------------------------------------------------------------------------------------------ the same OUT again


def test_a_finished_output_is_recognised(bitpress: Run, llama: Path, out: Path) -> None:
    assert bitpress("quantize", llama, out, *RTN).code == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    done = bitpress("quantize", llama, out, *RTN)
    assert done.code == 0
    assert "holds this very model already" in " ".join(done.err.split())
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_another_recipe_is_refused_and_force_replaces(bitpress: Run, llama: Path, out: Path) -> None:
    assert bitpress("quantize", llama, out, *RTN).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    other = ("quantize", llama, out, "--weights", "int8-row", "--quantizer", "rtn", "--proof-tokens", "0")
    done = bitpress(*other)
    assert done.code == 2
    assert "recipe.weights (int4-g16 there, int8-row here)" in done.error
    assert "--force" in done.error
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    done = bitpress(*other, "--force")
    assert done.code == 0, done.err
    pressed = CompressedCheckpoint.open(out)
    assert {record.spec["terms"][0]["format"] for record in pressed.manifest.weights.values()} == {"int8-row"}
    assert not (out / JOB_DIRECTORY).exists()


def test_force_takes_away_what_only_the_old_model_had(
    bitpress: Run, tiny_model: Callable[..., Path], llama: Path, tmp_path: Path, out: Path
) -> None:
    assert bitpress("quantize", tiny_model("llama", num_hidden_layers=3), out, *RTN).code == 0
    plain = tmp_path / "plain"
    shutil.copytree(llama, plain)
    (plain / "chat_template.jinja").unlink()
    assert bitpress("quantize", plain, out, *RTN, "--force").code == 0
    names = {p.name for p in out.iterdir()}
    assert "chat_template.jinja" not in names
    assert sorted(name for name in names if name.endswith(".safetensors")) == [
        "bitpress-00001-of-00002.safetensors",
        "bitpress-00002-of-00002.safetensors",
        "bitpress.safetensors",
    ]
    assert bitpress("verify", out).code == 0


def test_an_unfinished_job_of_another_recipe_is_refused(bitpress: Run, llama: Path, text_file: Path, out: Path) -> None:
    stopped = ("quantize", llama, out, "--weights", "int2-row", "--quantizer", "rtn", "--proof-tokens", "64")
    assert bitpress(*stopped, "--proof-text", text_file, "--max-kl", "1e-9").code == 6
    done = bitpress("quantize", llama, out, *RTN)
    assert done.code == 2
    assert "unfinished job that differs in recipe.weights (int2-row there, int4-g16 here)" in done.error
    assert bitpress("quantize", llama, out, *RTN, "--force").code == 0
    assert bitpress("verify", out).code == 0


# ------------------------------------------------------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("run", "DIR", "--prompt", ""), "the prompt is empty"),
        (("run", "DIR", "--prompt", "\udcff"), "not valid UTF-8"),
        (("run", "DIR", "--json"), "--json needs a --prompt"),
        (("run", "DIR", "--prompt", "word " * 300), "the model's context is 256"),
        (("run", "DIR", "--prompt", "a", "--memory", "60XB"), "for example 60MB, 1.5GB or 64MiB"),
        (("run", "DIR", "--prompt", "a", "--head", "IQ3_M"), "nearest here: weights q3_k"),
        (("run", ""), "an argument is empty"),
        (("eval", "DIR", "--memory", "-5"), "for example 60MB"),
        (("eval", "DIR", "--width", "4"), "no weight is nested"),
        (("run", "DIR", "--prompt", "a", "--width", "4"), "no weight is nested"),
        (("bench", "decode", "DIR", "--width", "3"), "8, 4 or 2 bits a weight"),
        (("eval", "DIR", "--text", ""), "--text: its value is empty"),
        (("plan", "MODEL", "--weights", "int4-g16", "--calibration", "missing.txt"), "does not exist"),
        (("formats", "--measure", "MODEL", "--format", "q4_k_m"), "nearest here: weights q4_k"),
        (("inspect",), "either DIR or --machine"),
        (("inspect", "DIR", "--machine"), "either DIR or --machine"),
        (("eval", "DIR", "--against", "MODEL", "--text", "missing.txt"), "does not exist"),
        (("eval", "DIR", "--against", "MODEL", "--text", "builtin:heldoutt"), "Did you mean 'heldout'?"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_wrong_use_of_the_other_commands(
    command: tuple[str, ...], says: str, bitpress: Run, pressed_original: Path, llama: Path
) -> None:
    places = {"DIR": pressed_original, "MODEL": llama}
    done = bitpress(*(places.get(word, word) for word in command))
    assert done.code == 2
    assert says in done.error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quantise",), "there is no command 'quantise'. Did you mean 'quantize'?"),
        (("quantize",), "MODEL is missing. Example: bitpress quantize "),
        (("quantize", "MODEL"), "OUT is missing"),
        (("plan", "--no-such-option"), "there is no option --no-such-option"),
        (("plan", "MODEL", "--weight", "int4-g64"), "Did you mean --weights?"),
        (("plan", "MODEL", "--debug"), "--debug goes before the command"),
        (("plan", "MODEL", "--weights"), "--weights"),
        (("plan", "MODEL", "--bits", "4.5"), "--bits: a whole number is needed (got '4.5')"),
        (("plan", "MODEL", "more"), "more"),
        (("eval", "DIR", "--tokens", "1"), "--tokens: 2 or more is needed (got '1')"),
        (("eval", "DIR", "--tokens=1"), "--tokens: 2 or more is needed (got '1')"),
        (("run", "DIR", "--top-p", "1.5"), "--top-p: 1 or less is needed (got '1.5')"),
        (("run", "DIR", "--temperature", "hot"), "--temperature: a number is needed (got 'hot')"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_of_the_command_line_itself(arguments: tuple[str, ...], says: str, bitpress: Run) -> None:
    done = bitpress(*arguments)
    assert done.code == 2
    assert says in done.error
    assert "Input should" not in done.error
    assert len(done.error) <= 3 * 80
    assert done.out == ""


def test_every_command_prints_pure_json(bitpress: Run, llama: Path, pressed_original: Path, text_file: Path, out: Path) -> None:
    proof = ("--proof-text", text_file, "--proof-tokens", "64")
    commands: dict[tuple[Any, ...], set[str]] = {
        ("plan", llama, "--weights", "int4-g16"): {"weights", "bits_per_weight", "recipe"},
        ("quantize", llama, out, *RTN[:4], *proof): {"figures", "layers", "job"},
        ("eval", out, "--against", llama, "--text", text_file, "--tokens", "64", "--length", "64"): {"kl_mean", "bytes"},
        ("run", pressed_original, "--prompt", "a", "--max-tokens", "2"): {"text", "tokens"},
        ("inspect", out): {"formats", "recipe"},
        ("inspect", "--machine"): {"threads", "torch"},
        ("verify", out): {"files", "weights"},
    }
    for command, keys in commands.items():
        done = bitpress(*command, "--json")
        assert done.code == 0, done.err
        assert keys <= set(json.loads(done.out)), command
    for listing in ("methods", "formats", "models"):
        rows = json.loads(bitpress(listing, "--json").out)
        assert rows
        assert all("name" in row for row in rows)


@pytest.mark.parametrize(
    ("command", "code", "kind"),
    [
        (("quantize", "MODEL", "OUT", "--weights", "int4-g24", "--quantizer", "rtn"), 2, "FormatError"),
        (("plan", "NOWHERE"), 3, "CheckpointError"),
        (("plan", "MODEL", "--skip", "*.no_such"), 2, "UsageError"),
        (("plan", "MODEL", "--bits", "four"), 2, "BadParameter"),
        (("plan", "MODEL", "--wieghts", "int4-g64"), 2, "NoSuchOption"),
        (("plan",), 2, "MissingParameter"),
        (("eval", "NOWHERE"), 3, "CheckpointError"),
        (("run", "NOWHERE", "--prompt", "a"), 3, "CheckpointError"),
        (("compare", "MODEL", "OUT", "--recipes", "missing.yaml"), 2, "UsageError"),
        (("bench", "decoding", "NOWHERE"), 2, "UsageError"),
        (("inspect", "NOWHERE"), 3, "CheckpointError"),
        (("verify", "NOWHERE"), 3, "CheckpointError"),
        (("formats", "--picture", "x.png"), 2, "UsageError"),
        (("methods", "gtpq"), 2, "UsageError"),
        (("models", "--all"), 2, "NoSuchOption"),
        (("no-such-command",), 2, "UsageError"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_with_json_an_error_is_an_object_and_all_that_is_printed(
    command: tuple[str, ...], code: int, kind: str, bitpress: Run, llama: Path, tmp_path: Path, out: Path
) -> None:
    places = {"MODEL": llama, "OUT": out, "NOWHERE": tmp_path / "nowhere"}
    done = bitpress(*(places.get(word, word) for word in command), "--json")
    assert done.code == code, done.err
    error = json.loads(done.out)["error"]
    assert error["code"] == code
    assert error["kind"] == kind
    assert f"error: {error['message']}" == done.error
    plain = bitpress(*(places.get(word, word) for word in command))
    assert (plain.code, plain.out) == (code, "")


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyError("lm_head"), 1, "KeyError: 'lm_head' This was not foreseen; `bitpress --debug ...` shows where it happened."),
        (RuntimeError("first\n" + "more\n" * 900), 1, "RuntimeError: first more"),
        (MemoryError("no room"), 5, "out of memory: no room"),
        (OSError(28, "No space left on device", "x.bin"), 4, "x.bin: No space left on device; make room"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (JobStopped("stopped on request"), 75, "stopped on request"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_raised_ends_in_one_line(
    raised: BaseException, code: int, says: str, bitpress: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("bitpress.checkpoints.named.describe_models", fail)
    done = bitpress("models", "--json")
    assert (done.code, done.error.removeprefix("error: ").startswith(says)) == (code, True), done.err
    assert json.loads(done.out)["error"]["code"] == code
    assert len(done.err) < 400


def test_what_was_printed_already_is_not_followed_by_an_object(bitpress: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.cli import info as looking
    from bitpress.cli import screen

    def print_and_fail(rows: Any) -> None:
        screen.print_json(rows)
        raise UsageError("too late")

    monkeypatch.setattr(looking, "print_json", print_and_fail)
    done = bitpress("models", "--json")
    assert done.code == 2
    assert isinstance(json.loads(done.out), list)


def test_debug_shows_the_traceback(bitpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.cli import app

    done = bitpress("--debug", "inspect", tmp_path / "missing")
    monkeypatch.setitem(app._state, "debug", False)
    assert done.code == 3
    assert "Traceback" in done.err
    assert os.fspath(tmp_path) in done.err


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"])
@pytest.mark.parametrize("given", [None, "0"])
def test_what_torch_reads_when_it_loads_is_set_and_never_overruled(
    name: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "app", lambda **_: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ[name] == (given or {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}[name])
