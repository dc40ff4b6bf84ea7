"""Settings that layers choose among: measured as plain formulas say, stored as any layer, told in plan and report, refused where it cannot be."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import bitpress
from bitpress.calibration import Stats
from bitpress.calibration.observers import Seen, static_format
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import BitpressError, FormatError, UsageError
from bitpress.formats import ActivationFormat, parse_format
from bitpress.pipeline.for_runtime import fit_to
from bitpress.pipeline.layer_choice import settings_errors
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.quantize import plan_run
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import NAMED_RECIPES, build_method, make_recipe, told_weights

SCHEMES = Path(__file__).resolve().parents[2] / "benchmarks" / "schemes.yaml"
CALIBRATION = {"samples": 2, "length": 32}
# Two weights of a block are enough where the road is what counts.
FEW = ["*", "!*.q_proj", "!*.down_proj"]
STATIC = {"format": "int8-tensor", "parameters": "static"}
FLOATS = {
    "weights": "e2m1-row",
    "quantizer": "rtn",
    "inputs": "e2m1-row-fp32",
    "choose": {
        "by": "output-error",
        "among": [{"weights": f"{w}-row", "inputs": f"{x}-row-fp32"} for w in ("e1m2", "e3m0") for x in ("e1m2", "e3m0")],
    },
}
BY_RANGE = {
    "weights": "int8-row",
    "quantizer": "rtn",
    "transforms": ["fptq-smooth"],
    "inputs": STATIC,
    "choose": {
        "by": {"name": "range", "edges": [15.0, 150.0]},
        "among": [{"inputs": STATIC, "scales": False}, {"inputs": STATIC}, {"inputs": "int8-row-fp32", "scales": False}],
    },
}
TOKENS = torch.arange(6, 38).reshape(2, 16)


def quantize(model: Path, out: Path, **keys: Any) -> dict[str, Any]:
    return bitpress.quantize(model, out, recipe={**keys, "calibration": CALIBRATION}, proof_tokens=0)


def with_norms(source: Path, target: Path, factors: dict[str, float]) -> Path:
    """Return a copy of a tiny Llama whose norms before attention are so many times as large."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, factor in factors.items():
        tensors[name].mul_(factor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_errors_of_settings_are_those_of_the_rounded_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 32, generator=generator) ** 3, torch.randn(12, 32, generator=generator)
    static = {"format": "e2m1-tensor", "parameters": "static", "observer": "output"}
    recipe = {
        **FLOATS,
        "choose": {"by": "output-error", "among": [{"weights": "e3m0-row"}, {"inputs": static}, {"inputs": "keep"}]},
    }
    method = build_method(make_recipe(recipe)).for_layer("w")
    planned = PlannedWeight(WeightParameter("w.weight", (12, 32)), method, 0)
    found = settings_errors(w, Stats(40, sample=x), planned, method.settings)

    def rounded(name: str) -> torch.Tensor:
        return RTN(clip="mse").quantize(w, None, parse_format(name)).weight.dequantize()

    seen, tensor = Seen(product=lambda u: u @ w.T), parse_format("e2m1-tensor")
    for part in x.split(16):
        seen.add(part)
    observer = method.settings[1].inputs
    assert observer is not None
    assert observer.observer is not None
    chosen = static_format(tensor, observer.observer.part.choose(seen, tensor)).round(x)
    by_token, wanted = ActivationFormat(parse_format("e2m1-row-fp32")).round(x), x @ w.T
    pairs = [(by_token, rounded("e3m0-row")), (chosen, rounded("e2m1-row")), (x, rounded("e2m1-row"))]
    expected = [float((u @ v.T - wanted).square().sum() / wanted.square().sum()) for u, v in pairs]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert expected[2] < expected[0]


def test_every_layer_stores_what_it_chose_and_computes_it_on_every_road(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    report = quantize(model, tmp_path / "out", **FLOATS)
    records = CompressedCheckpoint.open(tmp_path / "out").manifest.weights
    kinds = set()
    for row in report["layers"]:
        record = records[f"{row['name']}.weight"]
        fmt, inputs = record.spec["terms"][0]["format"], record.input["format"]  # type: ignore[index]
        assert (row["format"], row["inputs"]) == (fmt, f"{inputs} dynamic")
        assert row["choice"].startswith(f"{fmt}, inputs {inputs} dynamic (output-error ")
        kinds.add((fmt, inputs))
    assert kinds <= {(f"{w}-row", f"{x}-row-fp32") for w in ("e1m2", "e3m0") for x in ("e1m2", "e3m0")}
    assert report["job"]["recipe"]["choose"]["by"] == {"name": "output-error"}
    decoded, packed = (bitpress.load(tmp_path / "out", weights=kind, dtype="fp32") for kind in ("decoded", "packed"))
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=TOKENS, use_cache=False).logits for m in (decoded, packed)))
    # For these weights e3m0 is the worse format, and no layer that may choose has its error.
    worse = quantize(model, tmp_path / "worse", **{**FLOATS, "weights": "e3m0-row", "choose": None})
    assert all(a["error"] <= b["error"] for a, b in zip(report["layers"], worse["layers"], strict=True))


def test_the_range_of_an_input_decides_how_it_is_rounded_and_whether_it_is_scaled(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    norm = "model.layers.{}.input_layernorm.weight"
    model = with_norms(tiny_model("llama"), tmp_path / "source", {norm.format(0): 20.0, norm.format(1): 500.0})
    report = quantize(model, tmp_path / "out", **BY_RANGE)
    rows = {row["name"].removeprefix("model.layers."): row for row in report["layers"]}
    asked = {f"{i}.{part}": rows[f"{i}.{part}"] for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}
    assert {name: row["inputs"] for name, row in asked.items()} == {
        "0.self_attn.q_proj": "int8-tensor static",
        "0.mlp.up_proj": "int8-tensor static",
        "1.self_attn.q_proj": "int8-row-fp32 dynamic",
        "1.mlp.up_proj": "int8-tensor static",
    }
    assert "no channel scales" in asked["0.mlp.up_proj"]["choice"]
    assert "no channel scales" not in asked["0.self_attn.q_proj"]["choice"]
    source, out = load_file(model / "model.safetensors"), CompressedCheckpoint.open(tmp_path / "out")
    moved = {name: not torch.equal(out.load(name)[name].float(), source[name].float()) for name in source if "norm" in name}
    assert [name for name, yes in moved.items() if yes] == [norm.format(0)]


def test_a_plan_lists_the_settings_and_an_override_settles_its_layers(tiny_model: Callable[..., Path]) -> None:
    method = build_method(make_recipe({**FLOATS, "overrides": [{"match": "*.v_proj", "inputs": "keep"}]}))
    assert build_method(make_recipe(method.resolved())).resolved() == method.resolved()
    plan, _, _ = plan_run(tiny_model("llama"), method)
    rows = {row["name"].rpartition(".")[2]: row for row in plan.as_dict()["weights"]}
    assert rows["q_proj"]["settings"][0] == "e1m2-row, inputs e1m2-row-fp32 dynamic"
    assert "settings" not in rows["v_proj"]
    assert "each layer one of 4 settings, by output-error" in told_weights(method.resolved())
    with pytest.raises(UsageError, match="choose settles them in it"):
        fit_to(method, tiny_model("llama"), "vllm")
    sizes = {**FLOATS, "choose": {"by": "output-error", "among": [{"weights": "e2m1-row"}, {"weights": "e2m3-row"}]}}
    with pytest.raises(FormatError, match=r"choose: e2m3-row takes .* bytes where e2m1-row takes"):
        plan_run(tiny_model("llama"), build_method(make_recipe(sizes)))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"choose": {"by": "range", "among": [{}, {}]}}, "range: 2 edges part 3 settings"),
        ({"choose": {"by": "least", "among": [{}, {}]}}, "unknown choice 'least'"),
        ({"choose": {"by": "output-error", "among": [{}]}}, "choose.among: a list of 2 or more is needed"),
        ({"choose": {"among": [{}, {}]}}, "choose.by"),
        ({"choose": "range"}, "choose"),
        ({"choose": {"by": "output-error", "among": [{}, {"weight": "int4-row"}]}}, "Did you mean 'weights'?"),
        ({"choose": {"by": "output-error", "among": [{}, {"weights": "dfloat11"}]}}, "keeps weights bit for bit"),
        ({"choose": {"by": "range", "among": [{}, {}, {"scales": False}]}, "transforms": []}, "this recipe has none"),
        (
            {"choose": {"by": "output-error", "among": [{}, {"scales": False}]}, "transforms": ["smoothquant"]},
            "compares settings behind channel scales",
        ),
        ({"choose": FLOATS["choose"], "budget": 4.0, "weights": "int4-row"}, "a budget chooses the formats"),
        (
            {"choose": {"by": "output-error", "among": [{}, {"weights": "int4-g32"}]}, "tuning": ["signround"]},
            "known before the run",
        ),
    ],
)
def test_choices_that_cannot_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(BitpressError, match=says):
        make_recipe(keys)


@pytest.mark.parametrize("name", ["llm-fp4", "fptq", "abq-llm"])
def test_named_recipes_end_in_a_model(name: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    keys = {**NAMED_RECIPES[name].keys, "weights": NAMED_RECIPES[name].keys["weights"].replace("g64", "g16")}
    report = quantize(tiny_model("llama", num_hidden_layers=1), tmp_path / "out", skip=FEW, **keys)
    assert all((row["choice"] is None) is (name == "abq-llm") for row in report["layers"])
    assert all(row["error"] < 0.2 for row in report["layers"])


@pytest.mark.parametrize(
    "name",
    [
        "w4a8, lqer (l2qer), per token",
        "w4a4, lorc (plain lqer), groups of 64",
        "w4a4, svdquant, groups of 64",
        "w2a2, bipolar, per token",
    ],
)
def test_schemes_of_the_bench_quantize_and_load(name: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    keys = {key: value for key, value in yaml.safe_load(SCHEMES.read_text())[name].items() if key != "bits"}
    text = yaml.safe_dump(keys).replace("g64", "g16").replace("rank: 32", "rank: 4")
    report = quantize(tiny_model("llama", num_hidden_layers=1), tmp_path / "out", skip=FEW, **yaml.safe_load(text))
    assert all(row["inputs"] is not None for row in report["layers"])
    model = bitpress.load(tmp_path / "out", dtype="fp32")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=TOKENS, use_cache=False).logits).all()
