"""`bitpress rotations` writes what `bitpress quantize` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress import learn_rotations
from bitpress.errors import UsageError

FORMATS = ("--weights", "int4-row", "--inputs", "int4-row-fp32")


def test_the_command_writes_what_quantize_reads(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, bitpress: Callable[..., Any]
) -> None:
    model, file, recipe, out = tiny_model("llama"), tmp_path / "r.safetensors", tmp_path / "recipe.yaml", tmp_path / "out"
    text = ("--calibration", text_file, "--samples", "4", "--length", "32")
    done = bitpress("rotations", model, file, *FORMATS, *text, "--steps", "2", "--json")
    assert done.code == 0, done.err
    keys = {
        "weights": "int4-row",
        "quantizer": "rtn",
        "transforms": [{"name": "rotate", "kind": "given", "tensors": str(file)}],
    }
    recipe.write_text(json.dumps(keys), encoding="utf-8")
    assert bitpress("quantize", model, out, "--recipe", recipe, "--proof-tokens", "0").code == 0
    assert json.loads(done.out)["sha256"] in (out / "bitpress.json").read_text(encoding="utf-8")


def test_bad_settings_are_one_line_and_no_file(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, bitpress: Callable[..., Any]
) -> None:
    model, file = tiny_model("llama"), tmp_path / "r.safetensors"
    for options, says in (
        (("--loss", "mse"), "loss=mse"),
        (("--rounds", "none"), "rounds='none'"),
        (("--rate", "0"), "learning rate is more than 0"),
        (("--calibration", "nowhere.txt", "--length", "32"), "nowhere.txt"),
    ):
        text = () if "--calibration" in options else ("--calibration", text_file, "--samples", "4", "--length", "32")
        done = bitpress("rotations", model, file, *FORMATS, *text, *options)
        assert done.code == 2
        assert says in done.err
        assert len(done.err.strip().splitlines()) == 1
    assert not file.exists()


def test_python_learns_with_the_same_settings(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    text = {"calibration": str(text_file), "samples": 4, "length": 32}
    formats = {"weights": "int4-row", "inputs": "int4-row-fp32"}
    model, file = tiny_model("llama"), tmp_path / "r.safetensors"
    found = learn_rotations(model, file, **formats, **text, steps=1, loss="cross-entropy", rounds="inputs")
    assert (found.file, found.steps, found.loss) == (str(file), 1, "cross-entropy")
    with pytest.raises(UsageError, match="step"):
        learn_rotations(model, file, **formats, **text, force=True, stepps=1)
    with pytest.raises(UsageError, match="exists already"):
        learn_rotations(model, file, **formats, **text)
