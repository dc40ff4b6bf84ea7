"""The Python interface: the options of the command line under the same names, and progress where somebody sees it."""

import inspect
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from progress_record import Said
from rich.console import Console

import bitpress
from bitpress import screen
from bitpress.cli.app import quantize as command
from bitpress.cli.recipe_options import read_method
from bitpress.errors import UsageError
from bitpress.recipes import Method, Recipe, build_method, choose_method, make_recipe
from bitpress.screen import Screen, watch

# What only a command needs.
OF_THE_COMMAND = {"output", "sets", "explain", "as_json"}


def test_python_has_every_option_of_the_command() -> None:
    options = set(inspect.signature(command).parameters) - OF_THE_COMMAND
    assert options | {"out", "progress"} == set(inspect.signature(bitpress.quantize).parameters)


def test_both_make_the_same_recipe() -> None:
    made = choose_method(None, bits=3, quantizer="gptq", calibration={"samples": 5, "seed": None}, skip=["*.v_proj"]).recipe
    assert made == read_method(None, None, 3, None, "gptq", None, None, 5, None, None, ["*.v_proj"]).recipe
    assert made.calibration.samples == 5
    own = make_recipe({"weights": "int8-row", "calibration": {"length": 32}, "skip": ["*.k_proj"]})
    assert isinstance(own, Recipe)
    made = choose_method(own, calibration={"samples": 5}, skip=["*.v_proj"]).recipe
    assert made == make_recipe(
        {"weights": "int8-row", "calibration": {"length": 32, "samples": 5}, "skip": ["*.k_proj", "*.v_proj"]}
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_to_a_terminal_and_on_request(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, heard in ((None, terminal), (True, True), (False, False)):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with watch(asked) as progress:
            progress.begin("working", 1)
            progress.advance("block 0")
        assert ("working" in stream.getvalue()) == heard


def test_progress_of_ones_own_hears_everything(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, model = Said(), tiny_model("llama")
    bitpress.quantize(model, tmp_path / "out", weights="int4-g16", quantizer="rtn", proof_tokens=0, progress=said)
    assert any(unit.startswith("model.layers.1") for unit in said.units)
    bitpress.evaluate(tmp_path / "out", model, tokens=64, length=32, progress=said)
    assert len(said.stages) >= 2
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="cache needs `against`"):
        bitpress.evaluate(tmp_path / "out", cache="int8")


def test_a_recipe_is_built_once(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    built = []

    def counting(recipe: Recipe, **said: Any) -> Method:
        built.append(recipe)
        return build_method(recipe, **said)

    monkeypatch.setattr("bitpress.recipes.text.build_method", counting)
    monkeypatch.setattr("bitpress.pipeline.quantize.build_method", counting)
    bitpress.quantize(tiny_model("llama"), tmp_path / "out", weights="int4-g32-zero", quantizer="rtn", proof_tokens=0)
    assert len(built) == 1


def test_a_bar_on_a_narrow_terminal_keeps_its_count_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("bitpress.screen.err", Console(file=stream, force_terminal=True, width=80))
    with Screen() as screen:
        screen.begin("quantizing", 272)
        for i in range(272):
            screen.advance(f"model.layers.{i}.mlp.experts.down_proj", error=0.25)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).rstrip().splitlines()[-1]
    assert re.search(r"272/272 model\.layers.*… \d:\d\d:\d\d ETA \d:\d\d:\d\d$", last)


def test_steps_of_a_unit_count_in_the_log_and_in_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the first of four units took 20 seconds: 3.5 are left, 140 seconds."""
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(screen, "err", Console(file=stream, width=200))
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    with Screen() as shown:
        shown.begin("quantizing", 4)
        now[0] = 10.0
        shown.step("blocks.0", 0.25, loss=0.5)  # too early for a line
        now[0] = 20.0
        shown.step("blocks.0", 0.5, loss=0.25)
    assert stream.getvalue().splitlines()[1].startswith("quantizing: 0/4 blocks.0  loss 0.25  memory ")
    assert stream.getvalue().endswith("ETA 2:20\n")
