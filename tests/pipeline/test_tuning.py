"""Blocks of whole models learned further by gradients: what is published, what is kept, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_method

FEW = {"steps": 6, "batch": 3, "checks": 2}


def run(model: Path, out: Path, recipe: Any) -> dict[str, Any]:
    quantize_directory(model, out, recipe, proof=Proof(tokens=0))
    return dict(json.loads((out / "report.json").read_text()))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_the_tiny_model_is_learned_published_and_loaded_again(tmp_path: Path) -> None:
    """Two ways to learn after each other, each from what the one before left."""
    from bitpress import quantize

    recipe = {
        "weights": "int2-g32-zero",
        "quantizer": "rtn",
        "calibration": {"samples": 4, "length": 16},
        "tuning": [{"name": "block-ap", "steps": 4}, {"name": "norm-tweaking", "steps": 2}],
    }
    report = quantize("bitpress-tiny", tmp_path / "out", recipe=recipe, proof_tokens=64)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["tuned"]
    blocks = len({row["name"] for row in rows})
    assert [row["tuning"] for row in rows] == ["block-ap", "norm-tweaking"] * blocks
    assert all(row["kept"] == (row["after"] < row["before"]) and row["failed"] is None for row in rows)
    assert all(row["kept"] and len(row["calibration"]) == 4 for row in rows[::2])
    assert report["figures"]["kl_mean"] > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_what_is_not_learned_stays_as_it_was(
    architecture: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Parameters stored [in, out] and experts too: codes stay under `parameters`, vectors without `norms`, and so do all other tensors."""
    model = tiny_model(architecture)
    tuning = {"name": "parameters", "norms": 0, "rate": 1e-3, **FEW}
    before, after = tmp_path / "before", tmp_path / "after"
    run(model, before, gptq_recipe())
    report = run(model, after, gptq_recipe(tuning=[tuning]))
    first, second = weights(before), weights(after)
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert any(row["kept"] for row in report["tuned"])
    # The first block has the same inputs in both runs, and so the same codes.
    assert {name.rpartition(".")[2] for name in changed if ".0." in name.partition("experts")[0]} == {"scale"}
    assert {name.rpartition(".")[2] for name in changed} <= {"codes", "scale", "zero"}
    experts = [row for row in report["layers"] if "experts" in row["name"]]
    assert bool(experts) == (architecture == "mixtral")
    if experts:  # each of them has scales of its own, and they are learned with the block
        assert any("experts" in name for name in changed)


def test_the_first_loss_is_that_of_the_start(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever learns: it is judged against the weights that a run without it publishes, so the first losses are one number."""
    found = set()
    for name in ("parameters", "block-ap", "signround"):
        recipe = gptq_recipe(transforms=[{"name": "hadamard", "outputs": True}], tuning=[{"name": name, "norms": 0, **FEW}])
        found.add(run(tiny_model("llama"), tmp_path / name, recipe)["tuned"][0]["before"])
    assert len(found) == 1


@pytest.mark.parametrize("run_time", [False, True])
def test_a_layer_alone_is_learned_by_the_input_that_it_has(
    run_time: bool, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behind scaled channels, folded or divided at run time, the loss of a layer is the error that its row of the report has."""
    scales = [{"name": "awq-scale", "run_time": run_time}]
    tuning = [{"name": "block-ap", "span": "layer", **FEW}]
    plain = run(tiny_model("llama"), tmp_path / "plain", gptq_recipe(transforms=scales))
    tuned = run(tiny_model("llama"), tmp_path / "tuned", gptq_recipe(transforms=scales, tuning=tuning))
    held_out = {row["name"]: row["held_out"]["all"]["error"] for row in plain["layers"]}
    first = [row for row in tuned["tuned"] if ".layers.0." in row["name"]]
    assert len(first) == 7
    for row in first:
        # Both are sums of squares over some 10^3 tokens in float32, in another order.
        assert row["before"] == pytest.approx(held_out[row["name"]], rel=1e-3)


@pytest.mark.parametrize("run_time", [False, True])
def test_the_blocks_own_target_is_what_it_makes_uncompressed(
    run_time: bool, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """In the first block both targets are the same, so long as the loaded block computes what the original does."""
    before = []
    for targets in ("original", "same"):
        recipe = gptq_recipe(
            transforms=[{"name": "awq-scale", "run_time": run_time}], tuning=[{"name": "signround", "targets": targets, **FEW}]
        )
        before.append(run(tiny_model("llama"), tmp_path / targets, recipe)["tuned"][0]["before"])
    # Folded norms are rounded once, to the model's own type.
    assert before[0] == pytest.approx(before[1], rel=0.02)


def test_a_format_that_is_not_served_is_noted(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = gptq_recipe(weights="nf4-g32", quantizer={"name": "rtn"}, tuning=[{"name": "adaround", **FEW}])
    report = run(tiny_model("llama"), tmp_path / "out", recipe)
    assert "tuned" not in report
    assert {row["notes"][-1] for row in report["layers"]} == {"adaround cannot learn codes of nf4-g32; they stay as they were"}
    assert CompressedCheckpoint.open(tmp_path / "out")


def test_a_tuning_that_can_learn_nothing_is_said_before_any_work(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = gptq_recipe(weights="nf4-g32", quantizer={"name": "rtn"}, tuning=[{"name": "adaround", **FEW}])
    with pytest.raises(UsageError, match=r"adaround learns codes of int.*it learns nothing.*--strict"):
        quantize_directory(tiny_model("llama"), tmp_path / "out", recipe, proof=Proof(tokens=0), strict=True)
    assert not (tmp_path / "out").exists()


def test_learning_that_ends_early_is_a_fallback(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Scales are thrown beyond the range of their store at the first step."""
    recipe = gptq_recipe(tuning=[{"name": "parameters", "norms": 0.0, "rate": 1e6, **FEW}])
    report = run(tiny_model("llama"), tmp_path / "out", recipe)
    said = {row["weight"]: row["what"] for row in report["fallbacks"]}
    assert report["tuned"][0]["failed"] is not None
    assert said.keys() == {row["name"] for row in report["tuned"] if row["failed"] is not None}
    assert "parameters ended early" in said[report["tuned"][0]["name"]]
    assert "its start is kept" in said[report["tuned"][0]["name"]]
    with pytest.raises(NumericsError, match=r"parameters ended early.*--strict"):
        quantize_directory(tiny_model("llama"), tmp_path / "strict", recipe, proof=Proof(tokens=0), strict=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "inputs of the original": ({"calibration": {"inputs": "original"}}, "calibration.inputs cannot be original"),
    "formats without loss": ({"weights": "dfloat11", "quantizer": {"name": "rtn"}}, "dfloat11 keeps weights bit for bit"),
    "rounded inputs of layers": (
        {"inputs": "int8-row", "tuning": [{"name": "signround", "span": "layer"}]},
        "learn blocks",
    ),
    "maps of a layer": ({"tuning": [{"name": "flatquant", "span": "layer"}]}, "use span=block"),
    "layers behind maps": (
        {"tuning": ["flatquant", {"name": "signround", "span": "layer"}]},
        "before maps were learned by flatquant",
    ),
    "steps of rotations": ({"tuning": [{"name": "block-ap", "optimizer": "cayley"}]}, "optimizer=cayley"),
    "rotations by other steps": ({"tuning": [{"name": "spinquant", "optimizer": "adam"}]}, "optimizer=adam"),
    "less than nothing": ({"tuning": [{"name": "flatquant", "clip_inputs": -1}]}, "clip_inputs=-1"),
    "layers behind norms": ({"tuning": [{"name": "parameters"}, {"name": "signround", "span": "layer"}]}, "put it first"),
    "norms of a layer": ({"tuning": [{"name": "parameters", "span": "layer"}]}, "give norms=0"),
    "a loss of blocks": ({"tuning": [{"name": "signround", "span": "layer", "loss": "channels"}]}, "loss=channels"),
    "no steps": ({"tuning": [{"name": "signround", "steps": 0}]}, "steps=0"),
    "a name of another kind": ({"tuning": ["gptq"]}, "that is a quantizer; it goes under quantizer"),
    "a misspelled name": ({"tuning": ["signroun"]}, "signround"),
    "a misspelled setting": ({"tuning": [{"name": "signround", "step": 3}]}, "steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    keys, why = REFUSED[case]
    with pytest.raises((UsageError, FormatError), match=why):
        make_method({"weights": "int4-g64-zero", "quantizer": "gptq", "tuning": ["signround"], **keys})
