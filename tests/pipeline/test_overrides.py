"""Some weights in another format, by another method or both: each is what a run with that alone makes of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bitpress
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.cli.app import app
from bitpress.errors import BitpressError, NumericsError, UsageError
from bitpress.pipeline.plan import unmeant_bits
from bitpress.pipeline.quantize import plan_run
from bitpress.recipes import build_method, dump_recipe, load_recipe, make_recipe, told_weights

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OVERRIDES: list[dict[str, Any]] = [
    {"match": "*.v_proj", "weights": "int6-g16", "quantizer": "rtn"},
    {"match": "*.down_proj", "quantizer": {"name": "hqq", "rounds": 5}},
    {"match": "*.mlp.*", "weights": "int5-g16-zero"},
    {"match": "*.up_proj", "quantizer": "boa"},
]


def test_each_weight_is_what_its_own_method_makes_of_it(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """On the original's inputs a weight does not depend on what becomes of the others."""
    calibration = {"text": str(text_file), "samples": 4, "length": 32, "inputs": "original"}

    def press(name: str, **values: Any) -> CompressedCheckpoint:
        recipe = {"weights": "int4-g16-zero", "quantizer": "gptq", "calibration": calibration, **values}
        bitpress.quantize(tiny_model(), tmp_path / name, recipe=recipe, proof_tokens=0)
        return CompressedCheckpoint.open(tmp_path / name)

    mixed = press("mixed", overrides=OVERRIDES)
    alone = {
        "self_attn.v_proj": press("v", weights="int6-g16", quantizer="rtn"),
        # The last that matches counts, and what it leaves out is the recipe's.
        "mlp.down_proj": press("down", weights="int5-g16-zero"),
        "mlp.gate_proj": press("gate", weights="int5-g16-zero"),
        "mlp.up_proj": press("up", quantizer="boa"),
    }
    plain = press("plain")
    differs = 0
    for i in range(2):
        for name in PROJECTIONS:
            weight = f"model.layers.{i}.{name}.weight"
            found = mixed.read_weight(weight)
            assert torch.equal(found.dequantize(), alone.get(name, plain).read_weight(weight).dequantize()), name
            differs += not torch.equal(found.dequantize(), plain.read_weight(weight).dequantize())
    assert differs >= 6, "v, down and gate of both blocks"
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "Weights named `*.v_proj` are in `int6-g16` by `rtn`." in card
    assert "Weights named `*.up_proj` are in `int4-g16-zero` by `boa`." in card
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "mixed")]).stdout
    assert "*.v_proj int6-g16 by rtn" in shown


def test_the_recipe_as_it_is_written_down_is_the_recipe(tmp_path: Path) -> None:
    recipe = make_recipe({"quantizer": "gptq", "overrides": OVERRIDES})
    assert build_method(recipe).needs == {"gram", "row_gram", "head_gram"}, "of all methods"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert build_method(again).resolved() == build_method(recipe).resolved()
    assert build_method(recipe).resolved()["overrides"][1]["quantizer"]["rounds"] == 5
    told = told_weights(build_method(recipe).resolved())
    assert told.startswith("int4-g64-zero; *.v_proj int6-g16 by rtn; *.down_proj by hqq; *.mlp.* int5-g16-zero; ")
    given = {"name": "quip-sharp", "residual": "e8p"}
    spelled = make_recipe(
        {"weights": "e8p-row", "quantizer": "quip_sharp", "overrides": [{"match": "*.v_proj", "quantizer": given}]}
    )
    assert spelled.overrides[0].quantizer == {"name": "quip_sharp", "residual": "e8p"}
    assert told_weights(build_method(spelled).resolved()) == "e8p-row; *.v_proj by quip_sharp (residual e8p)"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"match": "*", "quantizer": "gptqq"}, "unknown quantizer 'gptqq'. Did you mean 'gptq'"),
    "unknown setting": ({"match": "*", "quantizer": {"name": "gptq", "dampp": 1}}, "setting of quantizer 'gptq'"),
    "without a name": ({"match": "*", "quantizer": {"damp": 0.1}}, "unknown quantizer"),
    "unknown format": ({"match": "*", "weights": "int99"}, "int99"),
    "nothing": ({"match": "*.v_proj"}, "'*.v_proj' names neither weights nor a quantizer"),
    "misspelled": ({"match": "*", "weight": "int4-g64"}, "overrides.0.weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_override_that_cannot_be_is_refused(what: str) -> None:
    override, said = REFUSED[what]
    with pytest.raises(BitpressError) as caught:
        make_recipe({"overrides": [override]})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_holds_a_weight_to_its_own_method(tiny_model: Callable[..., Path]) -> None:
    override = {"match": "*.v_proj", "weights": "int2-g16-zero", "quantizer": "quip_sharp"}
    with pytest.raises(BitpressError, match=r"quip_sharp.*layers\.0\.self_attn\.v_proj") as caught:
        plan_run(tiny_model(), build_method(make_recipe({"quantizer": "gptq", "weights": "int4-g16", "overrides": [override]})))
    assert "q_proj" not in str(caught.value)
    fine = make_recipe(
        {"quantizer": "rtn", "weights": "int4-g16", "overrides": [{**override, "quantizer": "db_llm", "weights": "int4-g16"}]}
    )
    with pytest.raises(BitpressError, match="db_llm"):
        plan_run(tiny_model(), build_method(fine))
    meant = make_recipe(
        {"quantizer": "rtn", "weights": "int4-g16", "overrides": [{**override, "quantizer": "comq", "weights": "int8-g16"}]}
    )
    plan, _, _ = plan_run(tiny_model(), build_method(meant))
    assert unmeant_bits(plan) == ["comq is meant for codes of 2 to 4 bits a weight, and int8-g16 has 8"]


def test_a_weight_that_is_rounded_needs_no_inputs(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """A weight whose inputs are all zero is rounded without statistics, a named fallback; with rtn it needs none."""
    shutil.copytree(tiny_model(), tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.input_layernorm.weight"].zero_()
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    recipe: dict[str, Any] = {"weights": "int4-g16-zero", "quantizer": "gptq"}
    recipe["calibration"] = {"text": str(text_file), "samples": 4, "length": 32}
    report = bitpress.quantize(tmp_path / "model", tmp_path / "a", recipe=recipe, proof_tokens=0)
    text = "every calibration input of this layer was zero; rounded without statistics"
    queries = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    assert report["fallbacks"] == [{"weight": name, "what": text} for name in queries]
    assert report["calibrated"] == {"weights": 10, "of": 14}
    with pytest.raises(NumericsError, match=rf"q_proj: {text} \(an error because of --strict\)"):
        bitpress.quantize(tmp_path / "model", tmp_path / "c", recipe=recipe, proof_tokens=0, strict=True)
    recipe["overrides"] = [{"match": "*.layers.0.self_attn.*", "quantizer": "rtn"}]
    report = bitpress.quantize(tmp_path / "model", tmp_path / "b", recipe=recipe, proof_tokens=0)
    assert report["fallbacks"] == []
    assert report["calibrated"] == {"weights": 10, "of": 14}


def test_what_overrides_need_is_refused_where_it_cannot_be() -> None:
    override = {"match": "*", "quantizer": "boa"}
    with pytest.raises(UsageError, match="sees a block as a whole"):
        make_recipe({"quantizer": "gptq", "overrides": [override], "calibration": {"sequential": True}})
    with pytest.raises(UsageError, match="leave out hadamard"):
        make_recipe(
            {
                "quantizer": "rtn",
                "transforms": ["hadamard"],
                "overrides": [{"match": "*", "quantizer": "squeezellm", "weights": "kmeans3-row"}],
            }
        )
