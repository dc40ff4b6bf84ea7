"""Recipes that a runtime could not load are refused before any work, and plans say so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.errors import UsageError
from bitpress.pipeline.for_runtime import carriers, fit_to
from bitpress.pipeline.quantize import plan_run
from bitpress.recipes import build_method, make_recipe

W8A8 = {"weights": "int8-row", "quantizer": "rtn", "inputs": "int8-row-fp32"}


@pytest.mark.parametrize(
    ("runtime", "keys", "says"),
    [
        ("vllm", {"weights": "int4-g32", "quantizer": "adadim"}, "a format that adadim chooses"),
        ("vllm", {**W8A8, "weights": "int4-g32"}, "does not round inputs .* beside weights in int4-g32"),
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
