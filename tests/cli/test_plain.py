"""`bitpress run` on what is not compressed: it runs as it is, by transformers, and says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress.checkpoints.safetensors_file import read_header, read_tensor, serialize
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli import plain
from bitpress.progress import Progress

Run = Callable[..., Any]
ASK = ("--prompt", "The sea was calm", "--raw", "--max-tokens", "6")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plain_model_answers_as_transformers_does(dtype: str, bitpress: Run, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama", dtype=dtype)
    done = bitpress("run", model, *ASK, "--json")
    assert done.err == f"transformers: the model is not compressed; weights as stored, {dtype}, {torch.get_num_threads()} " + (
        "thread\n" if torch.get_num_threads() == 1 else "threads\n"
    )
    own = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = load_tokenizer(model)
    ids = tokenizer("The sea was calm", return_tensors="pt")["input_ids"]
    made = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert done.json["text"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_gguf_file_and_a_name_are_made_into_directories_first(
    bitpress: Run, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def resolve(model: str, progress: Progress) -> Path:
        given.append(model)
        progress.note(f"{model}: converting to a model directory, once")
        return tiny_model("llama")

    monkeypatch.setattr("bitpress.pipeline.exporting.resolve_model", resolve)
    for name in ("model.gguf", "smollm2-135m"):
        done = bitpress("run", name, *ASK)
        assert done.code == 0, done.err
        assert done.err.startswith(f"{name}: converting to a model directory, once\ntransformers: the model is not compressed")
    assert given == ["model.gguf", "smollm2-135m"]


@pytest.mark.parametrize(
    "options", [("--cache", "int8"), ("--activations", "none"), ("--packed",), ("--memory", "1GB"), ("--runtime", "native")]
)
def test_what_only_a_compressed_model_has_is_refused(
    options: tuple[str, ...], bitpress: Run, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model("llama")
    done = bitpress("run", model, *ASK, *options)
    assert done.code == 2
    assert f"`bitpress quantize {model} OUT --bits 4` compresses it" in done.error
    assert done.error.startswith(f"error: {' '.join(options) if options[0] == '--runtime' else options[0]}: {model} is not")


def test_weights_that_are_not_there_are_never_made_up(bitpress: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from shutil import copytree

    model = tmp_path / "holes"
    copytree(tiny_model("llama"), model)
    file, name = model / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    held = {n: read_tensor(file, entry) for n, entry in read_header(file)[0].items() if n != name}
    file.write_bytes(b"".join(bytes(part) for part in serialize(held, {"format": "pt"})))
    done = bitpress("run", model, *ASK)
    assert (done.code, name in done.error) == (3, True)
    assert done.out == ""


def test_an_unfinished_job_is_no_plain_model(tiny_model: Callable[..., Path], tmp_path: Path, bitpress: Run) -> None:
    from bitpress.checkpoints.compressed import JOB_DIRECTORY

    (tmp_path / "out" / JOB_DIRECTORY).mkdir(parents=True)
    assert plain.open_plain(tmp_path / "out") is None
    done = bitpress("run", tmp_path / "out", *ASK)
    assert done.code == 3
    assert "run the same quantize command again" in done.error
    assert bitpress("run", "", *ASK).code == 2
