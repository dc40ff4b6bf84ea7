"""Whole models learned with rounded inputs, and with learned maps: what is published, folded, reported, loaded again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.calibration import Stats
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import NumericsError
from bitpress.formats import parse_format
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.pipeline.recoding import find_recode
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Named
from bitpress.transforms.qep import QEP
from bitpress.tuning.flatquant import FlatQuant

W4A4 = {"weights": "int4-row", "quantizer": {"name": "rtn"}, "inputs": "int4-row-fp32"}
FEW = {"steps": 4, "batch": 4, "checks": 2}


def run(model: Path, out: Path, recipe: Any) -> dict[str, Any]:
    quantize_directory(model, out, recipe, proof=Proof(tokens=0))
    return dict(json.loads((out / "report.json").read_text()))


def maps(out: Path) -> dict[str, str | None]:
    entries = json.loads((out / "bitpress.json").read_text())["weights"]
    return {name: None if e["spec"]["input_map"] is None else e["spec"]["input_map"]["kind"] for name, e in entries.items()}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flatquant of a llama": ("llama", {"name": "flatquant", "rate": 0.02}, W4A4 | {"transforms": ["smoothquant"]}),
    "omniquant of norms with biases": ("gpt2", {"name": "omniquant", "rate": 0.01}, W4A4),
    "stored ranges": (
        "llama",
        {"name": "ostquant", "rate": 0.01},
        W4A4 | {"inputs": {"format": "int8-tensor-zero", "parameters": "static"}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_maps_are_learned_published_and_loaded_again(
    case: str, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    architecture, tuning, keys = CASES[case]
    model = tiny_model(architecture, num_hidden_layers=1)
    plain = run(model, tmp_path / "plain", gptq_recipe(**keys))
    report = run(model, tmp_path / "out", gptq_recipe(**keys, tuning=[{**tuning, **FEW}]))
    (row,) = report["tuned"]
    assert row["failed"] is None
    assert row["kept"]
    assert row["after"] < row["before"]
    CompressedCheckpoint.open(tmp_path / "out", verify=True)
    # Errors of layers are told of what they stand for: folded factors do not count as errors.
    before = {r["name"]: r["error"] for r in plain["layers"]}
    assert all(r["error"] < 2 * before[r["name"]] + 1e-3 for r in report["layers"])
    # In a transformer loaded from the directory it is the same model, decoded or by its kernels.
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        decoded, packed = (bitpress.load(tmp_path / "out", weights=kind)(tokens).logits for kind in ("decoded", "packed"))
    # An input beside the edge of a code's cell may fall to either side by the order of a sum.
    assert float((packed - decoded).abs().mean()) < 0.02 * float(decoded.abs().mean())
    if architecture == "llama":
        kinds = maps(tmp_path / "out")
        assert len({kinds[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"}) == 1


def test_factors_are_folded_where_a_norm_or_a_matrix_takes_them(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Scales alone, of a llama: none of its inputs needs a map, norms and the rows before have the factors."""
    model = tiny_model("llama", num_hidden_layers=1)
    tuning = [{"name": "omniquant", "shifts": 0, "clip_weights": 0, "rate": 0.02, **FEW}]
    report = run(model, tmp_path / "out", gptq_recipe(**W4A4, tuning=tuning))
    assert report["tuned"][0]["kept"]
    assert set(maps(tmp_path / "out").values()) == {None}
    norms = [
        CompressedCheckpoint.open(path).load("model.layers.0.")["model.layers.0.input_layernorm.weight"]
        for path in (tmp_path / "out",)
    ]
    assert float((norms[0] - 1).abs().max()) > 1e-3
    assert report["tuned"][0]["learned"] == sum(report_channels(tmp_path / "out"))


def report_channels(out: Path) -> list[int]:
    """Return the channels of the two norms, and those that make the inputs of the output and the down projection: values, and rows of up."""
    shapes = {r["name"].rpartition(".")[2]: r["shape"] for r in json.loads((out / "report.json").read_text())["layers"]}
    return [shapes["q_proj"][1], shapes["up_proj"][1], shapes["v_proj"][0], shapes["up_proj"][0]]


@pytest.mark.parametrize("inputs", ["mxfp4", {"format": "int8-tensor", "parameters": "static"}])
def test_codes_are_learned_with_inputs_as_they_are_rounded(
    inputs: Any, tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """The loss of the start is that of the block that a run without learning publishes, inputs rounded."""
    model, found = tiny_model("llama", num_hidden_layers=1), {}
    for name in ("block-ap", "flatquant"):
        recipe = gptq_recipe(inputs=inputs, weights="int4-g32", quantizer={"name": "rtn"}, tuning=[{"name": name, **FEW}])
        found[name] = run(model, tmp_path / name, recipe)["tuned"][0]["before"]
    assert found["block-ap"] == found["flatquant"]


def test_codes_are_learned_behind_learned_maps(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """What comes second starts from what the maps left: its first loss is their last."""
    tuning = [{"name": "flatquant", "rate": 0.02, **FEW, "steps": 8}, {"name": "block-ap", **FEW}]
    report = run(tiny_model("llama", num_hidden_layers=1), tmp_path / "out", gptq_recipe(**W4A4, tuning=tuning))
    first, second = report["tuned"]
    assert first["kept"]
    assert second["before"] == first["after"]
    CompressedCheckpoint.open(tmp_path / "out", verify=True)


def test_the_recipes_quantizer_chooses_the_codes_in_a_learned_basis(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """GPTQ's codes behind a learned map are better than its codes before; rounding to nearest behind it is not, and the start is kept."""
    model, found = tiny_model("llama", num_hidden_layers=1), {}
    for codes in ("quantizer", "nearest"):
        tuning = [{"name": "flatquant", "clip_weights": 0, "codes": codes, **FEW, "steps": 12}]
        keys = {**W4A4, "weights": "int3-row", "transforms": ["smoothquant"], "quantizer": {"name": "gptq"}}
        found[codes] = run(model, tmp_path / codes, gptq_recipe(**keys, tuning=tuning))
    kept = found["quantizer"]["tuned"][0]
    assert kept["kept"]
    assert not found["nearest"]["tuned"][0]["kept"]
    assert "affine" in set(maps(tmp_path / "quantizer").values())
    CompressedCheckpoint.open(tmp_path / "quantizer", verify=True)


def test_a_quantizer_that_cannot_see_through_a_learned_map_leaves_rounding(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    keys = {**W4A4, "quantizer": {"name": "boa"}}
    tuning = [{"name": "flatquant", "rate": 0.02, **FEW}]
    report = run(tiny_model("llama", num_hidden_layers=1), tmp_path / "out", gptq_recipe(**keys, tuning=tuning))
    assert report["tuned"][0]["kept"]
    notes = [note for row in report["layers"] for note in row["notes"]]
    assert any("flatquant rounds to nearest: boa needs head_gram" in note for note in notes)


def test_codes_behind_a_learned_map_are_rounded_where_a_quantizer_adds_its_own() -> None:
    fmt = parse_format("int4-g16")
    recode, why = find_recode(FlatQuant(), LayerMethod(fmt, Named("quantizer", "gptq", GPTQ(groups="running"))), fmt, None)
    assert recode is None
    assert why == "rounds to nearest: gptq makes a map of its own for a weight, with these settings"


def test_codes_chosen_anew_have_the_format_that_was_stored_and_the_ranges_that_were_learned() -> None:
    """A format was widened since scales of these weights are below the range of fp16; ends of ranges are what is quantized, not left out."""
    w = 1e-7 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    method = LayerMethod(parse_format("int4-row"), Named("quantizer", "gptq", GPTQ()))
    recode, why = find_recode(FlatQuant(), method, parse_format("int4-row-fp32"), Stats(64, gram=torch.eye(32)))
    assert why is None
    assert recode is not None
    plain = recode(w, (None, None), None, None)[0].dequantize()
    assert float((plain - w).square().sum() / w.square().sum()) < 0.02
    clipped = recode(w, (None, None), None, lambda v: v.clamp(-5e-8, 5e-8))[0].dequantize()
    assert float(clipped.abs().max()) < 6e-8


def test_rounding_takes_a_changed_target_into_a_learned_basis() -> None:
    fmt, part = parse_format("int4-row"), Named("quantizer", "rtn", RTN())
    assert find_recode(FlatQuant(), LayerMethod(fmt, part), fmt, None) == (None, None)
    assert find_recode(FlatQuant(), LayerMethod(fmt, part, targets=(QEP(),)), fmt, None)[0] is not None


def test_a_fallback_behind_a_learned_map_is_in_the_report_and_an_error_where_strict(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falling(*given: Any) -> Any:
        recode, why = find_recode(*given)
        assert recode is not None
        return lambda *args: (recode(*args)[0], ("gave up",)), why

    monkeypatch.setattr("bitpress.pipeline.learned_inputs.find_recode", falling)
    keys = {**W4A4, "weights": "int3-row", "transforms": ["smoothquant"], "quantizer": {"name": "gptq"}}
    recipe = gptq_recipe(**keys, tuning=[{"name": "flatquant", "clip_weights": 0, **FEW, "steps": 12}])
    model = tiny_model("llama", num_hidden_layers=1)
    report = run(model, tmp_path / "out", recipe)
    assert report["tuned"][0]["kept"]
    told = [f["weight"] for f in report["fallbacks"] if f["what"] == "behind flatquant: gave up"]
    assert sorted(told) == sorted(r["name"] for r in report["layers"])
    with pytest.raises(NumericsError, match="behind flatquant: gave up"):
        quantize_directory(model, tmp_path / "strict", recipe, strict=True, proof=Proof(tokens=0))
