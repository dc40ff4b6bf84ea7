"""Tokens that count by the loss: their weights, the gram that is made with them, and recipes that ask for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import read_candidates
from bitpress.errors import UsageError
from bitpress.models.walk import walk
from bitpress.pipeline.calibration_stream import CalibrationStream, StatisticsVisitor, output_gram_of, token_weights
from bitpress.pipeline.gradients import SEED, measure_gradients
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import Calibration, build_method, make_recipe

TOKENS = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(5))
RECIPE = {"weights": "int4-row", "compute": "fp32", "transforms": [], "quantizer": "gptq", "calibration": {"gram": "loss"}}
SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"))


def by_hand(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the inputs of every linear of the first block and the gradients by its outputs, from transformers' model alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    inputs: dict[str, list[torch.Tensor]] = {}
    felt: dict[str, list[torch.Tensor]] = {}
    block = model.model.layers[0]
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):

            def watch(_: Any, args: Any, out: torch.Tensor, name: str = name) -> None:
                inputs.setdefault(name, []).append(args[0][0].detach())
                out.register_hook(lambda g: felt.setdefault(name, []).append(g[0]))

            module.register_forward_hook(watch)
    generator = torch.Generator().manual_seed(SEED)
    for text in TOKENS.split(1):
        logits = model(text).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn).backward()
    return {n: torch.stack(parts) for n, parts in inputs.items()}, {n: torch.stack(parts) for n, parts in felt.items()}


def test_output_grams_are_those_of_the_whole_model(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    inputs, gradients = by_hand(path)
    plan, model, _ = plan_run(path, build_method(make_recipe(RECIPE)))
    model.load_outer_()
    found = measure_gradients(model, plan.by_block(), TOKENS, {"output_gram"}, lambda: None, Silent())
    assert set(found) == {output_gram_of(p.stem) for block in plan.by_block() for p in block}, "nothing else was asked for"
    for name, g in gradients.items():
        g, x = g.flatten(0, 1).double(), inputs[name].flatten(0, 1).double()
        expected = (g * x.square().sum(-1, keepdim=True)).T @ g
        gram = found[output_gram_of(f"model.layers.0.{name}")]
        assert torch.equal(gram, gram.T)
        torch.testing.assert_close(gram.double(), expected / expected.diagonal().mean(), rtol=1e-3, atol=1e-4)


def test_experts_have_no_output_gram_and_say_so(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = gptq_recipe(quantizer={"name": "yaqa"}, transforms=[], min_expert_tokens=1)
    report = quantize_directory(tiny_model("mixtral"), tmp_path / "out", recipe, proof=Proof(tokens=0))
    told = [item["weight"] for item in report["fallbacks"] if "without feedback across rows" in item["what"]]
    experts = {row["name"] for row in report["layers"] if isinstance(row["tokens"], list)}
    assert experts
    assert set(told) == experts


def test_weights_and_gram_are_those_of_the_whole_model(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    inputs, gradients = by_hand(path)
    felt = {name: g.square().mean(-1) for name, g in gradients.items()}
    plan, model, _ = plan_run(path, build_method(make_recipe(RECIPE)))
    model.load_outer_()
    found = measure_gradients(model, plan.by_block(), TOKENS, {"loss_gram"}, lambda: None, Silent())
    stream = CalibrationStream(model, {"gram", "loss_gram"}, batch=2, follows_original=True, gradients=found)
    stream.start_(TOKENS, None)
    collected = StatisticsVisitor(stream)
    measured = []

    class Keep:
        def visit_(self, block: Any) -> None:
            measured.append(collected.found)

    walk(model, [collected, Keep()])
    for members in SHARED:
        expected = torch.stack([felt[name] / felt[name].mean() for name in members]).mean(0)
        x = inputs[members[0]].flatten(0, 1)
        gram = (x * expected.flatten()[:, None]).T @ x / len(x)
        for name in members:
            weights = found[token_weights(f"model.layers.0.{name}")]
            torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)
            assert measured[0] is not None
            stats = measured[0].stats[f"model.layers.0.{name}"]
            torch.testing.assert_close(stats.loss_gram, gram, rtol=1e-3, atol=1e-5)
            assert not torch.allclose(stats.loss_gram, stats.gram, rtol=0.05)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("mixtral", marks=pytest.mark.release)])
def test_a_recipe_that_asks_for_it_gets_other_codes(tiny_model: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    shared = {"weights": "int3-row", "transforms": [], "quantizer": "gptq"}
    drawn = {"samples": 8, "length": 32}
    for gram in ("input", "loss"):
        recipe = make_recipe({**shared, "calibration": {**drawn, "gram": gram}})
        quantize_directory(model, tmp_path / gram, recipe, proof=Proof(tokens=0))
    by_input, by_loss = (json.loads((tmp_path / gram / "report.json").read_text()) for gram in ("input", "loss"))
    errors = [{row["name"]: row["error"] for row in report["layers"]} for report in (by_input, by_loss)]
    changed = [name for name in errors[0] if errors[0][name] != errors[1][name]]
    assert len(changed) > len(errors[0]) / 2
    told = {row["name"]: row["fallbacks"] for row in by_loss["layers"]}
    # Which tokens reach an expert may change, so theirs count alike; that is told, and of no other weight.
    assert {name for name, texts in told.items() if texts} == {name for name in told if ".experts." in name}
    assert all("count alike" in text for texts in told.values() for text in texts)


def test_compared_recipes_share_one_pass(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipes = tmp_path / "recipes.yaml"
    recipes.write_text(
        "plain: {weights: int3-row, transforms: [], quantizer: gptq}\n"
        "felt: {weights: int3-row, transforms: [], quantizer: gptq, calibration: {gram: loss}}\n"
    )
    drawn = {"samples": 8, "length": 32, "inputs": "original"}
    made, _ = read_candidates(recipes, [3], drawn, compute="fp32")
    found = compare_recipes(tiny_model("llama"), tmp_path / "out", made, tokens=64, length=32, shared=Calibration(**drawn))
    kl = {row["name"]: row["kl_mean"] for row in found["rows"]}
    assert all(row["failed"] is None for row in found["rows"])
    assert kl["plain"] != kl["felt"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"quantizer": "gptaq"}, "cross goes with the gram of all tokens alike"),
        ({"quantizer": "rsq"}, "attention_gram goes with the gram of all tokens alike"),
        (
            {"quantizer": "yaqa", "transforms": ["awq-scale"]},
            "how the loss depends on outputs is not known once awq-scale has scaled them",
        ),
        ({"quantizer": "rtn", "transforms": []}, "nothing in this recipe needs the gram"),
    ],
)
def test_what_does_not_go_with_it_is_refused(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_recipe({**recipe, "calibration": {"gram": "loss"}})


def test_no_graph_is_left_behind(tiny_model: Callable[..., Path]) -> None:
    """What a sample's passes hold is given back before the next one: a circle through hooks would hold it for good."""
    import gc

    plan, model, _ = plan_run(tiny_model("llama"), build_method(make_recipe(RECIPE)))
    model.load_outer_()

    def tensors_after(samples: int) -> int:
        measure_gradients(model, plan.by_block(), TOKENS[:1].repeat(samples, 1), {"loss_gram"}, lambda: None, Silent())
        gc.collect()
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    tensors_after(1)  # what is made once is there
    before = tensors_after(1)
    assert tensors_after(6) <= before
