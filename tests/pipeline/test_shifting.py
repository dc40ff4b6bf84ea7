"""Shifts that fold into norms and biases: the layers behind are plain, the function is as before, and what takes no shift says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import UsageError
from bitpress.pipeline.exporting import export_model
from bitpress.pipeline.shifting import NO_NORM_BIAS
from bitpress.recipes import build_method, make_recipe, told_weights

TOKENS = torch.arange(6, 38).reshape(2, 16)
STATIC = {"format": "int8-tensor-zero", "parameters": "static"}


def quantize(model: Path, out: Path, *transforms: Any, **keys: Any) -> dict[str, Any]:
    calibration = {"samples": 2, "length": 32}
    recipe = {"weights": "int8-row", "quantizer": "rtn", "calibration": calibration, "transforms": list(transforms)}
    return bitpress.quantize(model, out, recipe={**recipe, "inputs": STATIC, **keys}, proof_tokens=0)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def far(model: Path, out: Path) -> float:
    original = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    return float((logits(bitpress.load(out, dtype="fp32")) - original).norm() / original.norm())


@pytest.fixture(scope="module")
def off_centre(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT whose norms have biases far from 0 that the layers behind take back: the function that it had."""
    path = tmp_path_factory.mktemp("opt") / "off-centre"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("opt"), dtype=torch.float32)
    tokenizer = tiny_model("opt")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.model.decoder.layers:
            attention = block.self_attn
            for norm, layers in (
                (block.self_attn_layer_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.final_layer_norm, (block.fc1,)),
            ):
                far = torch.randn(norm.bias.shape, generator=generator) * 20
                norm.bias += far
                for layer in layers:
                    layer.bias -= layer.weight @ far
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tokenizer / name).read_bytes())
    return path


def test_folded_shifts_leave_plain_layers_that_compute_the_same(off_centre: Path, tmp_path: Path) -> None:
    quantize(off_centre, tmp_path / "plain")
    report = quantize(
        off_centre, tmp_path / "folded", {"name": "shift", "place": "folded"}, "repquant-scale", corrections=["bias"]
    )
    records = CompressedCheckpoint.open(tmp_path / "folded").manifest.weights
    assert {key for record in records.values() if record.input for key in record.input} == {"format", "parameters"}
    errors = {name: far(off_centre, tmp_path / name) for name in ("plain", "folded")}
    assert errors["folded"] < 0.3 * errors["plain"]
    noted = {item["weight"].rpartition(".")[2] for item in report["notes"] if item["what"] == NO_NORM_BIAS}
    assert noted == {"out_proj", "fc2"}
    packed = bitpress.load(tmp_path / "folded", weights="packed", dtype="fp32")
    assert torch.equal(logits(packed), logits(bitpress.load(tmp_path / "folded", dtype="fp32")))
    export_model(tmp_path / "folded", tmp_path / "ct", "compressed-tensors")


def test_a_shift_stays_online_where_it_does_not_fold(off_centre: Path, tmp_path: Path) -> None:
    """The same function as with all shifts online, but for the mean error of weights, which a folded shift does not have."""
    quantize(off_centre, tmp_path / "online", "shift")
    quantize(off_centre, tmp_path / "either", {"name": "shift", "place": "either"})
    assert far(off_centre, tmp_path / "either") < 1.1 * far(off_centre, tmp_path / "online")
    records = CompressedCheckpoint.open(tmp_path / "either").manifest.weights
    shifted = {name.split(".")[-2] for name, record in records.items() if record.input and "shift" in record.input}
    assert shifted == {"out_proj", "fc2"}
    with pytest.raises(UsageError, match=r"not rounded alike \(shift\)"):
        export_model(tmp_path / "either", tmp_path / "ct", "compressed-tensors")


def test_a_network_without_biases_is_told_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize(tiny_model("llama"), tmp_path / "out", {"name": "shift", "place": "folded"}, "repquant-scale")
    assert {item["what"] for item in report["notes"]} == {NO_NORM_BIAS}
    records = CompressedCheckpoint.open(tmp_path / "out").manifest.weights
    assert not any("shift" in record.input for record in records.values() if record.input)
    assert "self_attn" in str(records)


def test_a_recipe_says_that_folded_shifts_leave_integer_products() -> None:
    def told(place: str) -> str:
        shift = {"name": "shift", "place": place}
        recipe = {"weights": "int8-row", "quantizer": "rtn", "inputs": STATIC, "transforms": [shift]}
        return told_weights(build_method(make_recipe(recipe)).resolved())

    assert "(integer products)" in told("folded")
    assert "(simulated)" in told("online")
    assert "(simulated)" in told("either")
    with pytest.raises(UsageError, match="a shift that folds sees a block as a whole"):
        make_recipe(
            {
                "inputs": STATIC,
                "quantizer": "gptq",
                "transforms": [{"name": "shift", "place": "folded"}],
                "calibration": {"sequential": True},
            }
        )


def test_layers_that_choose_how_their_inputs_are_rounded_are_shifted_too(off_centre: Path, tmp_path: Path) -> None:
    """The recipe itself rounds no input, and one setting none either: a note says of those that round alone what was not shifted."""
    choose = {"by": {"name": "range", "edges": [1000.0]}, "among": [{"inputs": STATIC}, {"inputs": "keep"}]}
    overrides = [{"match": "*.fc2", "inputs": "keep"}]
    kept = {
        "inputs": None,
        "choose": choose,
        "overrides": overrides,
        "skip": ["*", "!*.0.*.q_proj", "!*.0.fc?", "!*.0.*.out_proj"],
    }
    report = quantize(off_centre, tmp_path / "out", {"name": "shift", "place": "folded"}, **kept)
    assert far(off_centre, tmp_path / "out") < 0.02
    assert {item["weight"].rpartition(".")[2] for item in report["notes"] if item["what"] == NO_NORM_BIAS} == {"out_proj"}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "integer products"),
        ({"transforms": ["reassemble"]}, "simulated"),
        ({"tuning": ["omniquant"]}, "simulated"),
        ({"tuning": ["flatquant"]}, "simulated"),
        ({"tuning": ["ostquant"]}, "integer products"),
    ],
)
def test_a_recipe_says_when_channels_are_not_rounded_alike(keys: dict[str, Any], told: str) -> None:
    """Channels that are averaged, learned shifts and learned clipping: the engine multiplies no whole numbers there."""
    recipe = {"weights": "int8-row", "quantizer": "rtn", "inputs": "int8-row-fp32", **keys}
    assert f"({told})" in told_weights(build_method(make_recipe(recipe)).resolved())
