"""`plan` sums by kind and by reason, `inspect` names every part of the recipe and the proof; both fit 80 columns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress import native
from bitpress.cli import screen
from bitpress.cli.reports import describe_directory, show_inspection, show_plan
from bitpress.pipeline.planned_weight import place_in_block
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.recipes import build_method, make_recipe

Run = Callable[..., Any]
RECIPE = {
    "weights": "int4-g16-zero",
    "transforms": ["balance", "hadamard", "qep"],
    "quantizer": {"name": "ldlq", "passes": 2},
    "corrections": [{"name": "lqer", "rank": 3}],
    "overrides": [{"match": "*.v_proj", "weights": "int8-row", "quantizer": "gptq"}],
    "skip": ["*.up_proj"],
}


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("looking") / "out"
    recipe = make_recipe(RECIPE | {"calibration": {"text": str(text_file), "samples": 4, "length": 32, "sequential": True}})
    quantize_directory(tiny_model("llama"), out, recipe, proof=Proof(tokens=64, length=32))
    return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    monkeypatch.setattr(screen.out, "_width", 80)
    return lambda: capsys.readouterr().out


def test_plan_sums_by_kind_and_by_reason(tiny_model: Callable[..., Path], narrow: Callable[[], str]) -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    recipe = make_recipe({"weights": "int4-g16", "quantizer": "rtn", "skip": ["*.layers.1.*.v_proj"]})
    plan, streamed, _ = plan_run(model, build_method(recipe))
    kinds = {row["kind"]: row for row in plan.kinds()}
    assert {kind: row["count"] for kind, row in kinds.items()} == {
        "self_attn.q_proj": 3,
        "self_attn.k_proj": 3,
        "self_attn.v_proj": 2,
        "self_attn.o_proj": 3,
        "mlp.experts.gate_up_proj": 3,
        "mlp.experts.down_proj": 3,
    }
    assert sum(row["bytes"] for row in kinds.values()) == plan.compressed_bytes
    assert sum(row["bytes"] for row in plan.kept_by_reason.values()) == plan.kept_bytes
    assert sum(row["parameters"] for row in plan.kept_by_reason.values()) + len(plan.weights) == len(
        streamed.model.state_dict()
    )
    assert next(row for why, row in plan.kept_by_reason.items() if why.startswith("skipped as asked"))["parameters"] == 1
    assert plan.as_dict()["kinds"] == plan.kinds()
    show_plan(plan, build_method(recipe), 1.0)
    shown = narrow()
    assert "layers.0" not in shown
    assert "skipped as asked" in shown
    assert max(map(len, shown.splitlines())) <= 80
    show_plan(plan, build_method(recipe), 1.0, whole=True)
    shown = narrow()
    assert all(w.parameter.stem in shown.split() for w in plan.weights)
    assert "model.layers.1.self_attn.v_proj.weight" in shown


def test_the_whole_list_is_in_the_json_and_behind_an_option(bitpress: Run, tiny_model: Callable[..., Path]) -> None:
    command = ("plan", tiny_model("llama"), "--weights", "int4-g16", "--quantizer", "rtn")
    found = json.loads(bitpress(*command, "--json").out)
    assert len(found["weights"]) + len(found["outer"]) == sum(row["count"] for row in found["kinds"]) == 14 + 2
    assert "model.layers.1.mlp.up_proj" in bitpress(*command, "--all").out
    assert "model.layers.1.mlp.up_proj" not in bitpress(*command).out


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.h.11.attn.c_attn", "attn.c_attn"),
        ("model.layers.3.mlp.experts.17.up_proj", "mlp.experts.N.up_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_the_place_in_a_block(name: str, place: str) -> None:
    assert place_in_block(name) == place


def test_inspect_names_every_part_and_the_proof(made: Path, narrow: Callable[[], str]) -> None:
    facts = describe_directory(made)
    show_inspection(facts)
    lines = narrow().splitlines()
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines).split())
    for part in ("balance", "hadamard (block=row", "qep (damp=1.0", "ldlq (", "passes=2", "lqer (", "rank=3", "samples=4"):
        assert part in said, part
    for what in ("transform balance", "transform hadamard", "target qep", "correction lqer", "skip *.up_proj"):
        assert what in said, what
    assert "override *.v_proj int8-row by gptq" in said
    figures = facts["proof"]
    for entry in facts["formats"].values():
        stored = 8 * entry["bytes"] / entry["parameters"]
        assert native.available() == (entry["bits_in_memory"] is not None)
        assert entry["bits_in_memory"] is None or entry["bits_in_memory"] > 0.9 * stored
    assert f"{figures['kl_mean']:.4f}" in said
    assert "64 tokens of builtin:heldout in 2 windows" in said
    assert f"perplexity {figures['perplexity']:.3f} (original {figures['perplexity_original']:.3f})" in said
    assert "Quantized with bitpress" in said


def test_without_a_proof_inspect_says_how_to_have_one(pressed_original: Path, narrow: Callable[[], str]) -> None:
    facts = describe_directory(pressed_original)
    assert facts["proof"] is None
    show_inspection(facts)
    assert "No proof" in narrow()


def test_a_plan_and_an_inspection_tell_embeddings_and_head(
    bitpress: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = ("--weights", "int4-g16", "--quantizer", "rtn", "--embeddings", "int8-row", "--head", "int6-g16")
    planned = bitpress("plan", tiny_model(), *wanted)
    assert planned.code == 0, planned.err
    rows = {line.split()[0]: line.split()[1:] for line in planned.out.splitlines() if line.strip()}
    assert rows["model.embed_tokens"][:3] == ["1", "384x32", "int8-row"]
    assert rows["lm_head"][:3] == ["1", "384x32", "int6-g16"]
    assert "embeddings, head" in planned.out
    assert bitpress("quantize", tiny_model(), tmp_path / "out", *wanted, "--proof-tokens", 0).code == 0
    told = bitpress("inspect", tmp_path / "out").out
    assert "int6-g16 by rtn" in told
    keep = ("--embeddings", "keep", "--head", "keep")
    again = bitpress("plan", tiny_model(), "--weights", "int4-g16", "--quantizer", "rtn", *keep).out
    assert "lm_head" not in again
