"""Recipes that a runtime could not load are refused before any work, and plans say so."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.checkpoints.hub_names import hub_names
from bitpress.errors import UsageError
from bitpress.exchange.runtimes import RUNTIMES
from bitpress.models.linears import list_weights
from bitpress.models.opening import open_original
from bitpress.pipeline.for_runtime import carriers, division, fit_to
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.quantize import plan_run
from bitpress.pipeline.served import find_groups
from bitpress.recipes import build_method, make_recipe

Q8 = {"weights": "int8-g32", "quantizer": "rtn"}
RTN = {"weights": "int4-g32", "quantizer": "rtn"}
W8A8 = {"weights": "int8-row", "quantizer": "rtn", "inputs": "int8-row-fp32"}


@pytest.mark.parametrize(
    ("runtime", "keys", "says"),
    [
        ("vllm", {"weights": "int4-g32", "quantizer": "adadim"}, "a format that adadim chooses"),
        ("vllm", {**W8A8, "weights": "int4-g32"}, "does not round inputs .* beside weights in int4-g32"),
        (
            "vllm",
            {**RTN, "skip": ["*.q_proj"]},
            "one format for weights that it joins into one product: .*k_proj has int4-g32, and .*q_proj has 16 bits",
        ),
        (
            "vllm",
            {**RTN, "overrides": [{"match": "*.up_proj", "weights": "int8-g32"}]},
            "gate_proj has int4-g32, and .*up_proj has int8-g32",
        ),
        (
            "vllm",
            {**W8A8, "overrides": [{"match": "*.1.self_attn.k_proj", "inputs": "keep"}]},
            "q_proj has int8-row, its inputs in int8-row.*, and .*k_proj has int8-row[.]",
        ),
        ("llama.cpp", {**W8A8, "weights": "q8_0"}, "rounded|round inputs"),
    ],
)
def test_what_a_runtime_cannot_load(runtime: str, keys: dict[str, Any], says: str, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=says):
        fit_to(build_method(make_recipe(keys)), tiny_model("llama"), runtime)


def test_eight_bits_on_both_sides_go_to_vllm_and_nowhere_else(tiny_model: Callable[..., Path]) -> None:
    method = fit_to(build_method(make_recipe(W8A8)), tiny_model("llama"), "vllm")
    plan, model, _ = plan_run(tiny_model("llama"), method)
    found = carriers(plan.weights, method, model)
    assert [name for name, why in found.items() if why is None] == ["compressed-tensors"]


def test_experts_of_a_block_are_kept_or_compressed_together(tiny_model: Callable[..., Path]) -> None:
    method = build_method(make_recipe({**RTN, "skip": ["*.experts.down_proj"]}))
    with pytest.raises(
        UsageError, match=r"one format for all experts of a block: .*gate_up_proj has int4-g32, and .*down_proj has 16 bits"
    ):
        fit_to(method, tiny_model("mixtral"), "vllm")


# What vLLM joins in a block, by the names that each family has; a weight that a family joins itself has no others.
JOINED: dict[str, list[tuple[str, ...]]] = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "mixtral": [("gate_up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj")],
    "gpt2": [],
    "opt": [("q_proj", "k_proj", "v_proj")],
    "gemma3": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "phi3": [],
    "jetmoe": [("input_linear", "output_linear")],
    "llama4": [("gate_up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "qwen3_moe": [("gate_up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj")],
    "mamba": [],
    "mamba2": [],
}


def test_weights_that_a_server_joins_are_found_in_every_architecture(spine: str, tiny_model: Callable[..., Path]) -> None:
    method = build_method(make_recipe(RTN))
    model, _ = open_original(tiny_model(spine), method.compute)
    last = len(model.blocks) - 1
    weights = [PlannedWeight(p, method.for_layer(p.stem), last) for p in list_weights(model, last, ())[0]]
    groups = find_groups(model, method, weights, RUNTIMES["vllm"], hub_names(model.model))
    found = {frozenset(name.rpartition(".")[2] for name in group.names) for group in groups}
    assert found == {frozenset(names) for names in JOINED[spine]}


def test_weights_that_a_short_text_does_not_reach_are_joined_by_their_names(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitpress.pipeline.served.find_places", lambda model: {})
    with pytest.raises(UsageError, match=r"k_proj has int4-g32, and .*q_proj has 16 bits"):
        fit_to(build_method(make_recipe({**RTN, "skip": ["*.q_proj"]})), tiny_model("llama"), "vllm")


def test_a_plan_says_over_how_many_devices_a_model_can_be_divided(tiny_model: Callable[..., Path]) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 192}
    path = tiny_model("llama", hidden_size=128, **sizes)
    method = fit_to(build_method(make_recipe(RTN)), path, "vllm")
    plan, model, _ = plan_run(path, method)
    found = division(plan.weights, method, model, "vllm")
    assert found is not None
    assert found.refusals == {
        1: None,
        2: None,
        4: "model.layers.0.mlp.down_proj: 48 inputs a device, in groups of 32",
        8: "model.layers.0.self_attn.o_proj: 16 inputs a device, in groups of 32",
    }
    assert found.padded == {
        2: "model.layers.0.self_attn.q_proj: 96 outputs and 128 inputs a device",
    }
    assert division(plan.weights, method, model, "mlx") is None
    assert division(plan.weights, method, model, None) is None


def test_a_row_that_does_not_fill_words_is_refused(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama", intermediate_size=100)
    with pytest.raises(
        UsageError, match=r"vllm cannot load model\.layers\.0\.mlp\.down_proj: 100 inputs a device, 4 bits each"
    ):
        fit_to(build_method(make_recipe({**RTN, "weights": "int4-row"})), path, "vllm")


@pytest.mark.parametrize(
    ("runtime", "keys", "says"),
    [
        ("vllm", {**W8A8, "keys": "int8-row"}, "its attention rounds keys"),
        (
            "llama.cpp",
            {**Q8, "head": {"weights": "int8-g32", "quantizer": "rtn", "inputs": "int8-row-fp32"}},
            "lm_head: .*rounded",
        ),
    ],
)
def test_what_is_rounded_at_run_time_leaves_for_no_tool_that_cannot_say_it(
    runtime: str, keys: dict[str, Any], says: str, tiny_model: Callable[..., Path]
) -> None:
    """`export` refuses operands of attention and inputs of a head: a plan does too, and no run is begun for such a runtime."""
    method = build_method(make_recipe(keys))
    plan, model, _ = plan_run(tiny_model("llama"), method)
    assert plan.rounds
    found = carriers(plan.weights, method, model, plan.outer)
    assert re.search(says, found["gguf"] or "")
    assert ("keys" in keys) == (found["compressed-tensors"] is not None)
    with pytest.raises(UsageError, match=says):
        fit_to(method, tiny_model("llama"), runtime)


def test_a_folded_shift_leaves_layers_that_a_runtime_loads(tiny_model: Callable[..., Path]) -> None:
    for place, able in (("folded", ["compressed-tensors"]), ("either", [])):
        method = build_method(make_recipe({**W8A8, "transforms": [{"name": "shift", "place": place}]}))
        plan, model, _ = plan_run(tiny_model("opt"), method)
        assert [name for name, why in carriers(plan.weights, method, model).items() if why is None] == able
