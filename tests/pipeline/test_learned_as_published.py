"""The loss that learning reports at the end is that of what is published: everything rounded and folded as a reader finds it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.models.opening import open_streamed
from bitpress.pipeline.network import _Learner
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.pipeline.tuning import SpanTuner
from bitpress.recipes import build_method
from bitpress.tuning.objectives import BlockObjective

FEW = {"steps": 4, "batch": 2, "checks": 2, "rate": 2e-2}
ROWS = {"weights": "int4-row", "quantizer": {"name": "rtn"}, "inputs": "int4-row-fp32"}
STATIC = {"format": "int8-tensor-zero", "parameters": "static"}
FOLDED = ROWS | {"inputs": STATIC, "transforms": [{"name": "shift", "place": "folded"}]}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "operands of attention": (
        "llama",
        "flatquant",
        ROWS
        | {
            "keys": "int4-row",
            "probabilities": "int4-row",
            "transforms": ["qk-hadamard"],
            "corrections": [{"name": "softmax-bias", "each": "head"}],
        },
    ),
    "folded shifts, norms": ("opt", "parameters", FOLDED),
    "folded shifts, shifts": ("opt", "omniquant", FOLDED),
    "folded shifts, rotations": ("opt", "ostquant", FOLDED),
    "an input that is rounded in two ways": (
        "llama",
        "flatquant",
        ROWS | {"overrides": [{"match": "*k_proj", "inputs": STATIC}, {"match": "*gate_proj", "inputs": "int8-row"}]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_published_block_has_the_loss_that_is_reported(
    case: str,
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, name, keys = CASES[case]
    learned, tune = list[SpanTuner](), SpanTuner.tune

    def watched(tuner: SpanTuner, *args: Any) -> Any:
        learned.append(tuner)
        return tune(tuner, *args)

    monkeypatch.setattr(SpanTuner, "tune", watched)
    out, model = tmp_path / "out", tiny_model(family, num_hidden_layers=1)
    quantize_directory(model, out, gptq_recipe(**keys, tuning=[{"name": name, **FEW}]), proof=Proof(tokens=0))
    (row,) = json.loads((out / "report.json").read_text())["tuned"]
    (tuner,) = learned
    assert tuner.inputs is not None
    published = open_streamed(out, torch.float32)
    published.load_outer_()
    published.load_block_(0)
    for windows in {FEW["batch"], len(tuner.inputs) - tuner.stream.counted}:
        published.embed(torch.arange(32 * int(windows)).reshape(int(windows), 32))
    wanted, counted = tuner.targets["original"][0], tuner.stream.counted
    block = BlockObjective(lambda x, _: published.run_block(0, x), tuner.inputs, wanted, counted, "mse", batch=2)
    assert block.held_out({}) == pytest.approx(row["after"], rel=1e-6)


def test_the_published_network_has_the_loss_that_is_reported(
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a head whose inputs are rounded; weights that are not learned say so, and a block that is skipped stays."""
    texts = list[torch.Tensor]()

    def watched(learner: _Learner, inputs: torch.Tensor, counted: int, *rest: Any) -> Any:
        texts.extend(inputs[counted:])
        return learn(learner, inputs, counted, *rest)

    learn = _Learner.learn
    monkeypatch.setattr(_Learner, "learn", watched)
    model, tuning = tiny_model("llama"), {"name": "signround", "span": "network", "loss": "cross-entropy", "norms": 1e-2, **FEW}
    recipe = gptq_recipe(
        tuning=[tuning],
        skip=["*.layers.1.*"],
        head={"weights": "int4-row", "inputs": "int2-row"},
        overrides=[{"match": "*v_proj", "weights": "nf4-g32"}],
    )
    planned = plan_run(model, build_method(recipe))[0].learning
    quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=0))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["tuned"]
    published = bitpress.load(tmp_path / "out", dtype="fp32")
    with torch.no_grad():
        losses = [published(input_ids=text[None], labels=text[None]).loss for text in texts]
    assert float(torch.stack(losses).mean()) == pytest.approx(row["after"], rel=1e-5)
    assert planned is not None
    assert planned.learned == (row["learned"],)
    noted = [note["weight"] for note in report["notes"] if "signround cannot learn codes of nf4-g32" in note["what"]]
    assert noted == ["model.layers.0.self_attn.v_proj"]
