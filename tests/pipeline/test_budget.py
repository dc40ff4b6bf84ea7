"""A budget of bits: what it is chosen by, what it buys, and what it cannot be."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import bitpress
from bitpress.allocation.linearity import NOISES, measured_factors
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.cli.app import app
from bitpress.comparison import session
from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import read_candidates
from bitpress.errors import BitpressError, FormatError, UsageError
from bitpress.formats import parse_format
from bitpress.pipeline.budget import measure_offer
from bitpress.pipeline.compose import compress_matrix
from bitpress.pipeline.quantize import plan_run
from bitpress.progress import Silent
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import Calibration, dump_recipe, make_method, make_recipe

AMONG = ["int2-g16-zero", "int3-g16-zero", "int4-g16-zero", "int6-g16-zero"]
TOKENS = torch.randint(0, 384, (32, 24), generator=torch.Generator().manual_seed(5))


def test_factors_by_curvature_are_those_of_noise(tiny_model: Callable[..., Path]) -> None:
    """Noise in one weight after the other, by transformers' whole model and the KL divergence of its outputs: what the paper measures."""
    from transformers import AutoModelForCausalLM

    path = tiny_model("llama")
    plan, streamed, _ = plan_run(path, make_method({"weights": "int4-g16-zero", "budget": 4, "compute": "fp32"}))
    assert plan.offer is not None
    streamed.load_outer_()
    figures = measure_offer(streamed, plan.offer, TOKENS, lambda: None, Silent())
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def rise(w: torch.Tensor, noise: float) -> float:
        kept = w.clone()
        w.copy_(kept + (noise * kept.square().mean()).sqrt() * torch.randn(w.shape, generator=generator))
        changed = model(TOKENS).logits.log_softmax(-1)
        w.copy_(kept)
        return float((original.exp() * (original - changed)).sum(-1).mean())

    with torch.no_grad():
        original = model(TOKENS).logits.log_softmax(-1)
    stems = sorted(figures)
    measured = measured_factors([[rise(parameters[f"{stem}.weight"], noise) for noise in NOISES] for stem in stems])
    curved = [float(figures[stem][0]) for stem in stems]
    assert len(stems) == 14
    # 768 targets are drawn: their squared gradients' mean is within a tenth, as is that of three draws of a thousand weights and more.
    assert all(0.8 < c / m < 1.25 for c, m in zip(curved, measured, strict=True))
    ranks = torch.tensor([curved, measured]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95
    assert max(curved) > 10 * min(curved), "or the order says nothing"


def test_errors_are_those_of_rounding(tiny_model: Callable[..., Path]) -> None:
    """Of experts together, whose stacked parameter is one choice; the factor is 0 where the loss feels nothing."""
    path = tiny_model("mixtral")
    values = {"weights": "int4-g16", "budget": {"bits": 4, "among": ["int4-g16", "int2-g16"]}, "compute": "fp32"}
    plan, model, loader = plan_run(path, make_method({**values, "quantizer": "rtn"}))
    assert plan.offer is not None
    model.load_outer_()
    figures = measure_offer(model, plan.offer, TOKENS[:4], lambda: None, Silent())
    name = next(stem for stem in figures if stem.endswith("experts.down_proj"))
    stack = loader.load("model.layers.0.")[name].flatten(0, 1)
    for found, width in zip(figures[name][1:].tolist(), (4, 2), strict=True):
        fmt = parse_format(f"int{width}-g16")
        w_hat = RTN().quantize(stack, None, fmt).weight.dequantize()
        assert found == pytest.approx(float((stack - w_hat).square().sum() / stack.square().sum()), rel=1e-4)
    assert set(figures) == {w.parameter.stem for w in plan.weights}
    plenty = replace(plan.offer, bits=40.0)
    assert plenty.excess() is not None
    assert {fmt.name for fmt in plenty.choose(figures).values()} == {"int4-g16"}


def test_errors_are_those_of_a_recipe_without_statistics(tiny_model: Callable[..., Path]) -> None:
    method = make_method({"weights": "gauss4x2-row", "quantizer": "higgs", "budget": 3, "compute": "fp32"})
    plan, model, loader = plan_run(tiny_model(), method)
    assert plan.offer is not None
    model.load_outer_()
    figures = measure_offer(model, plan.offer, TOKENS[:4], lambda: None, Silent())
    name = "model.layers.1.mlp.down_proj"
    w = loader.load("model.layers.1.")[f"{name}.weight"]
    for found, fmt in zip(figures[name][1:].tolist(), method.options, strict=True):
        parts = replace(method.for_layer(name), format=fmt)
        assert len(parts.changes) == 1
        w_hat = compress_matrix(w, None, parts).weight.dequantize()
        assert found == pytest.approx(float((w - w_hat).square().sum() / w.square().sum()), rel=1e-3)


def press(model: Path, out: Path, text: Path, **keys: Any) -> dict[str, Any]:
    calibration = {"text": str(text), "samples": 8, "length": 32}
    recipe = {"weights": "int3-g16-zero", "quantizer": "rtn", "calibration": calibration, **keys}
    return bitpress.quantize(model, out, recipe=recipe, proof_tokens=0)


def test_a_budget_is_spent_and_told(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """By gptq, whose own override of one weight is heeded; formats, sizes and texts agree, and what is chosen is worth it."""
    overrides = [{"match": "*.0.*.v_proj", "weights": "int8-g16-zero"}, {"match": "*.1.*.v_proj", "quantizer": "hqq"}]
    keys = {"quantizer": "gptq", "overrides": overrides, "budget": {"bits": 4.6, "among": AMONG}}
    report = press(tiny_model(), tmp_path / "out", text_file, **keys)
    rows = {row["name"]: row for row in report["layers"]}
    formats = {name: row["format"] for name, row in rows.items()}
    assert formats.pop("model.layers.0.self_attn.v_proj") == "int8-g16-zero"
    assert set(formats.values()) <= set(AMONG)
    assert len(set(formats.values())) > 1
    bits = 8 * sum(row["bytes"] for row in rows.values()) / sum(math.prod(row["shape"]) for row in rows.values())
    assert 4.6 - 0.2 < bits <= 4.6, "a step of the smallest weight is 1024 of 20480 weights times a bit or two"
    told = report["budget"]
    assert (told["bits_asked"], told["bits_spent"]) == (4.6, pytest.approx(bits))
    assert sum(told["weights"].values()) == len(rows) == 14
    assert told["weights"]["int8-g16-zero"] == 1
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    stored = {name: record.spec["terms"][0]["format"] for name, record in checkpoint.manifest.weights.items()}
    assert stored == {f"{name}.weight": row["format"] for name, row in rows.items()}
    assert checkpoint.manifest.recipe["budget"] == {"bits": 4.6, "among": AMONG}
    assert make_recipe({k: v for k, v in checkpoint.manifest.recipe.items() if k != "calibration"}).budget
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| budget | 4.600 bits asked, {bits:.3f} spent: " in card
    assert "to 4.6 bits a weight with `gptq`" in card
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert f"4.6 bits of {AMONG[0]}" in " ".join(shown.stdout.split())


def test_a_choice_by_the_loss_is_better_than_one_format(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """At the bits of the plain format."""
    kl = {}
    for name, keys in {"plain": {}, "budget": {"budget": 4.25}}.items():
        press(tiny_model(), tmp_path / name, text_file, **keys)
        kl[name] = bitpress.evaluate(tmp_path / name, tiny_model(), text=str(text_file), tokens=512, length=32)
    assert kl["budget"]["bits_per_weight"] <= kl["plain"]["bits_per_weight"] == 4.25
    assert kl["budget"]["kl_mean"] < 0.9 * kl["plain"]["kl_mean"]


def test_what_cannot_be_is_said_before_any_work(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"budget": 0}, "budget.bits: a number above 0"),
        ({"budget": -3.3}, "budget.bits: a number above 0"),
        ({"budget": math.nan}, "budget.bits: a "),
        ({"budget": math.inf}, "budget.bits: a finite number is needed"),
        ({"budget": True}, "budget.bits: a number is needed"),
        ({"budget": "many"}, "budget.bits: a number is needed"),
        ({"budget": {"among": AMONG}}, "budget.bits: it is missing"),
        ({"budget": {"bits": 3, "amongst": AMONG}}, "Did you mean 'among'?"),
        ({"budget": {"bits": 3, "among": "int2-g16"}}, "budget.among: a list is needed"),
        ({"budget": {"bits": 3, "among": [3, 4]}}, "budget.among.0: a text is needed"),
        ({"budget": {"bits": 3, "among": ["int2-g16", "imt3-g16"]}}, "unknown number grid 'imt3'"),
        ({"budget": {"bits": 3, "among": ["int2-g16"]}}, "among names fewer than two formats"),
        ({"budget": {"bits": 3, "among": []}}, "among names fewer than two formats"),
        ({"budget": {"bits": 3, "among": ["int2-g16", "INT2_G16"]}}, "among names fewer than two formats"),
        ({"budget": {"bits": 3, "among": ["int2-g16", "dfloat11"]}}, "budget: dfloat11 keeps weights bit for bit"),
        ({"budget": {"bits": 3, "among": ["int2-g16", "boa"]}}, "that is a quantizer"),
        ({"weights": "int3-g32", "budget": {"bits": 3, "among": AMONG}}, "weights int3-g32 is not among int2-g16-zero"),
        ({"weights": "e8p-row", "quantizer": "quip_sharp", "budget": 3}, "e8p-row has no other widths to choose among"),
        ({"weights": "int3-g16", "quantizer": "higgs", "budget": 3}, "higgs serves gauss.*, not int3-g16"),
        ({"weights": "dfloat11", "transforms": [], "budget": 3}, "dfloat11 has no other widths"),
        ({"weights": "int4-g16", "budget": 2}, "budget of 2 bits a weight cannot be met: the smallest formats take 3.000"),
        (
            {"weights": "int4-g16", "budget": 3.1, "overrides": [{"match": "*.down_proj", "weights": "int8-g16"}]},
            r"budget of 3.1 bits a weight cannot be met: the smallest formats take 4\.",
        ),
        (
            {"weights": "int4-g16", "budget": 3.1, "overrides": [{"match": "*", "weights": "int2-g16"}]},
            "overrides say the format of every weight",
        ),
        (
            {"budget": {"bits": 3, "among": ["int2-g16", "int3-g24"]}},
            r"int3-g24: in_features=32 is not a multiple of 24.*model.layers.0.self_attn.q_proj",
        ),
        (
            {"budget": {"bits": 3, "among": ["int2-g16", "int3-g64"]}},
            "model.layers.0.mlp.gate_proj is too small for int3-g64; leave that out",
        ),
        (
            {"quantizer": "higgs", "budget": {"bits": 3, "among": ["gauss4-g16", "int3-g16"]}},
            "higgs serves gauss.*, not int3-g16.*model.layers.0.self_attn.q_proj",
        ),
    ]
    for keys, says in cases:
        with pytest.raises(BitpressError, match=says) as told:
            bitpress.quantize(tiny_model(), tmp_path / "out", recipe={"quantizer": "rtn", **keys}, proof_tokens=0)
        assert isinstance(told.value, (UsageError, FormatError))
        assert "\n" not in str(told.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "quantizer", "options"),
    [
        ("int3-g16-zero", "gptq", "int2-g16-zero int3-g16-zero int4-g16-zero int5-g16-zero int6-g16-zero int8-g16-zero"),
        ("gauss6x2-row", "higgs", "gauss4x2-row gauss6x2-row gauss8x2-row"),
        ("int7-g16-bf16", "rtn", " ".join(f"int{b}-g16-bf16" for b in range(2, 9))),
        ("nf4-g32", "rtn", "nf2-g32 nf3-g32 nf4-g32"),
        ("tcq2-row", "ldlq", "tcq2-row tcq3-row tcq4-row tcq5-row"),
        ("mxfp4", "rtn", "mxfp4-g32-e8m0 mxfp6-g32-e8m0 mxfp8-g32-e8m0"),
    ],
)
def test_without_names_the_options_are_the_widths(weights: str, quantizer: str, options: str) -> None:
    method = make_method({"weights": weights, "quantizer": quantizer, "budget": 3.5})
    assert [fmt.name for fmt in method.options] == options.split()
    again = yaml.safe_load(dump_recipe(method.recipe))
    assert again["budget"] == {"bits": 3.5, "among": options.split()}
    assert make_method(again).resolved() == method.resolved()


def test_a_recipe_without_a_budget_keeps_its_identity() -> None:
    assert "budget" not in make_method({}).resolved()
    assert not make_method({"quantizer": "rtn"}).reads_text
    # The first of the formats stands for the recipe's, where it names none.
    assert make_method({"budget": {"bits": 3.5, "among": AMONG}}).format.name == AMONG[0]


def test_a_plan_shows_what_is_offered(tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model())
    keys = ["--weights", "int3-g16-zero", "--quantizer", "rtn", "--set", "overrides=[{match: '*.v_proj', weights: int8-g16}]"]

    def plan(*more: str) -> str:
        found = CliRunner().invoke(app, ["plan", model, *keys, *more], env={"COLUMNS": "200"})
        assert found.exit_code == 0, found.output
        return found.stdout

    told = json.loads(plan("--set", "budget=4.4", "--json"))
    plain = json.loads(plan("--json"))
    assert told["bytes_compressed_weights"] == int(4.4 * 20480 / 8)
    assert told["bits_per_weight"] == pytest.approx(4.4, abs=1e-3)
    assert told["bytes"] - plain["bytes"] == told["bytes_compressed_weights"] - plain["bytes_compressed_weights"]
    assert told["disk_bytes_needed"] - plain["disk_bytes_needed"] == told["bytes"] - plain["bytes"]
    assert {row["name"].endswith("v_proj"): row["format"] for row in told["weights"]} == {True: "int8-g16", False: None}
    assert (told["budget"]["weights"], told["budget"]["weights_fixed"]) == (12, 2)
    shapes = [row["shape"] for row in told["weights"] if row["format"] is None]
    for width, option in zip((2, 3, 4, 5, 6, 8), told["budget"]["options"], strict=True):
        fmt = parse_format(f"int{width}-g16-zero")
        assert (option["format"], option["bytes"]) == (fmt.name, sum(fmt.nbytes(tuple(shape)) for shape in shapes))
    text = plan("--set", "budget=4.4", "--all")
    assert "chosen in the run" in text
    assert "A budget of 4.4 bits a weight" in text
    found = CliRunner().invoke(app, ["plan", model, *keys, "--set", "budget=40"])
    assert "more than the largest formats take" in found.output


def test_compared_recipes_choose_by_the_calibration_text(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the same formats, and as `quantize` does."""
    recipes = tmp_path / "recipes.yaml"
    among = f"among: [{', '.join(AMONG)}]"
    recipes.write_text(
        f"more: {{quantizer: {{name: rtn, clip: mse}}, weights: int3-g16-zero, budget: {{bits: 4.5, {among}}}}}\n"
        f"fewer: {{quantizer: gptq, weights: int4-g16-zero, budget: {{bits: 3.8, {among}}}}}\n"
    )
    drawn = {"text": str(text_file), "samples": 8, "length": 32}
    made, _ = read_candidates(recipes, [3], drawn, compute="fp32")
    calls = []
    measure = session.measure_offer
    monkeypatch.setattr(session, "measure_offer", lambda *given: calls.append(1) or measure(*given))
    shared = Calibration(**drawn, inputs="original")
    found = compare_recipes(tiny_model(), tmp_path / "out", made, tokens=64, length=32, shared=shared)
    assert [row["failed"] for row in found["rows"]] == [None, None]
    assert len(calls) == 1
    for row, bits in zip(found["rows"], (4.5, 3.8), strict=True):
        assert bits - 0.2 < row["bits_per_weight"] <= bits
        assert row["weights"].startswith(f"{bits} bits of int2-g16-zero, int3-g16-zero")
    keys = {"quantizer": {"name": "rtn", "clip": "mse"}, "budget": {"bits": 4.5, "among": AMONG}, "compute": "fp32"}
    report = press(tiny_model(), tmp_path / "alone", text_file, **keys)
    assert found["rows"][0]["formats"] == report["budget"]["weights"]
    with pytest.raises(UsageError, match="is the calibration text of more"):
        compare_recipes(tiny_model(), tmp_path / "judged", made, {"same": str(text_file)}, tokens=64, length=32)
