"""Recipes that go by a name, and the patterns of weights that are left alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.cli.app import main
from bitpress.errors import UsageError
from bitpress.models.linears import skipping
from bitpress.models.opening import open_original
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.recipes import NAMED_RECIPES, Calibration, build_method, load_recipe, make_recipe


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_moqe_presses_experts_alone(architecture: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model(architecture)
    quantize_directory(model, tmp_path / "out", load_recipe("moqe"), proof=Proof(tokens=0))
    pressed = CompressedCheckpoint.open(tmp_path / "out")
    assert len(pressed.manifest.weights) == 4
    assert all(".experts." in name for name in pressed.manifest.weights)
    assert {record.spec["terms"][0]["format"] for record in pressed.manifest.weights.values()} == {"int3-row"}
    _, loader = open_original(model, torch.float32)
    held = loader.load("")
    for name, value in pressed.load("").items():
        same = torch.equal(value.to(held[name].dtype), held[name])
        assert same is (name not in pressed.manifest.weights), name
    # What 3 bits with a scale a row lose: at most half a step of 2 * most / 7 a weight, and something.
    for name in pressed.manifest.weights:
        error = (pressed.load(name)[name].float() - held[name].float()).abs()
        assert 0 < error.max() <= held[name].abs().max() / 3


@pytest.mark.parametrize("architecture", ["llama", pytest.param("mixtral", marks=pytest.mark.release)])
def test_qtip_goes_through_the_whole_road(architecture: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model(architecture, num_hidden_layers=1)
    # Fewer states than the recipe's own: the same road in less time.
    changes: dict[str, object] = {"weights": "tcq2s10-row", "calibration": Calibration(samples=4, length=64)}
    recipe = load_recipe("qtip").model_copy(update=changes)
    quantize_directory(model, tmp_path / "qtip", recipe, proof=Proof(tokens=128))
    rounded = make_recipe({"weights": "int2-row", "quantizer": "rtn"})
    quantize_directory(model, tmp_path / "rounded", rounded, proof=Proof(tokens=128))
    ours, plain = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("qtip", "rounded"))
    compressed = CompressedCheckpoint.open(tmp_path / "qtip")
    assert {record.spec["terms"][0]["format"] for record in compressed.manifest.weights.values()} == {"tcq2s10-row"}
    assert ours["figures"]["kl_mean"] < 0.7 * plain["figures"]["kl_mean"]


@pytest.mark.parametrize("skip", [["*", "!*.experts.*"], ["*.experts.*"]])
def test_experts_are_known_by_what_they_do(skip: list[str], tiny_model: Callable[..., Path]) -> None:
    """JetMoe's are named mlp.input_linear and mlp.output_linear."""
    plan, _, _ = plan_run(
        tiny_model("jetmoe"), build_method(make_recipe({"weights": "int4-row", "quantizer": "rtn", "skip": skip}))
    )
    stacks = [w.parameter.experts > 0 for w in plan.weights]
    assert stacks == [skip[0] == "*"] * len(stacks)
    assert ("model.layers.1.mlp.input_linear" in {w.parameter.stem for w in plan.weights}) == (skip[0] == "*")


def test_a_model_without_experts_leaves_moqe_nothing_to_do(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"nothing is left to compress: skip \(\*, !\*\.experts\.\*\)"):
        plan_run(tiny_model("llama"), build_method(load_recipe("moqe")))


def test_the_command_line_takes_a_named_recipe_and_other_keys(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(tiny_model("mixtral")), "--recipe", "moqe", "--weights", "int2-g32-zero", "--json"]
    monkeypatch.setattr(sys, "argv", ["bitpress", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    planned = json.loads(capsys.readouterr().out)
    assert {row["format"] for row in planned["weights"]} == {"int2-g32-zero"}
    assert all("experts" in row["name"] for row in planned["weights"])
    assert planned["recipe"]["quantizer"]["name"] == "rtn"


def test_a_file_of_the_same_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("moqe").weights == "int3-row"
    (tmp_path / "moqe").write_text("weights: int8-row\n")
    assert load_recipe("moqe").weights == "int8-row"
    with pytest.raises(UsageError, match=f"one of these names: {', '.join(NAMED_RECIPES)}"):
        load_recipe("mooqe")


def test_the_last_pattern_that_matches_decides() -> None:
    def left(*skip: str) -> set[str]:
        return {name for name in ("up", "down", "out") if skipping((f"b.{name}", f"b.{name}.weight"), skip) is None}

    assert left() == {"up", "down", "out"}
    assert left("*.up") == {"down", "out"}
    assert left("*", "!*.up") == {"up"}
    assert left("!*.up", "*") == set()
    assert left("*", "!*.up", "*.u?") == set()
    assert left("!*.up") == {"up", "down", "out"}
    assert left("b.down.weight", "!b.out") == {"up", "out"}


@pytest.mark.parametrize("name", ["resq", "comet", "outliertune", "mptq-vit", "repquant"])
def test_recipes_of_rounded_inputs_end_in_a_model(name: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"calibration": Calibration(samples=2, length=32)}
    recipe = load_recipe(name).model_copy(update=changes)
    quantize_directory(tiny_model("opt", num_hidden_layers=1), tmp_path / "out", recipe, proof=Proof(tokens=64))
    records = CompressedCheckpoint.open(tmp_path / "out").manifest.weights
    told = {key for record in records.values() if record.input is not None for key in record.input}
    assert told - {"format", "parameters"} == (
        {"first"} if name in ("resq", "comet") else set() if name == "repquant" else {"shift"}
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["figures"]["kl_mean"] < 0.1
