"""Patterns of a recipe that match nothing are refused before any work, with what was meant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import read_candidates
from bitpress.errors import UsageError
from bitpress.pipeline.quantize import plan_run, quantize_directory
from bitpress.recipes import build_method, make_recipe

RTN = {"weights": "int4-g16", "quantizer": "rtn"}
GOOD: list[dict[str, Any]] = [
    {"skip": ["*.v_proj"]},
    {"skip": ["*", "!*.v_proj"]},
    {"skip": ["*.v_proj.weight"]},
    {"skip": ["lm_head"]},  # stays as it is anyway, as asked
    {"skip": ["model.embed_tokens"]},
    {"skip": ["*norm*"]},
    {"overrides": [{"match": "model.layers.[0-1].*.q_proj", "weights": "int8-row"}]},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"skip": ["*.donw_proj"]}, r"skip: '\*.donw_proj' matches no weight of this model; did you mean \*.down_proj\?"),
    ({"skip": ["down_proj"]}, r"did you mean \*.down_proj\?"),
    ({"skip": ["re:.*down_proj"]}, r"did you mean \*.down_proj\?"),
    ({"skip": ["*.DOWN_PROJ"]}, r"did you mean \*.down_proj\?"),
    ({"skip": ["self_att"]}, r"did you mean \*self_att\*\?"),
    ({"skip": ["*.v_proj", "*.vproj"]}, r"'\*.vproj' matches no weight"),
    ({"skip": ["model.layer.0.mlp.up_proj"]}, r"did you mean model.layers.0.mlp.up_proj\?"),
    ({"skip": ["model.layers.7.*"]}, r"'model.layers.7.\*' matches no weight"),
    ({"skip": ["*.v_proj", "!*.vv_proj"]}, r"'!\*.vv_proj' matches no weight of this model; did you mean !\*.v_proj\?"),
    ({"skip": ["!lm_head"]}, r"'!lm_head' matches only weights that stay uncompressed anyway"),
    ({"skip": [""]}, r"'' matches no weight"),
    ({"overrides": [{"match": "*.qproj", "weights": "int8-row"}]}, r"overrides: '\*.qproj' .* did you mean \*.q_proj\?"),
    (
        {"overrides": [{"match": "lm_head", "weights": "int8-row"}]},
        "overrides: 'lm_head' matches only weights that stay uncompressed anyway",
    ),
    (
        {"skip": ["*.q_proj"], "overrides": [{"match": "*.q_proj", "weights": "int8-row"}]},
        r"overrides: '\*.q_proj' matches only weights that stay",
    ),
]


@pytest.mark.parametrize("keys", GOOD, ids=str)
def test_what_matches_is_planned(keys: dict[str, Any], tiny_model: Callable[..., Path]) -> None:
    plan, _, _ = plan_run(tiny_model("llama", tie_word_embeddings=True), build_method(make_recipe(RTN | keys)))
    assert plan.weights


@pytest.mark.parametrize(("keys", "says"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_matches_nothing_is_refused(keys: dict[str, Any], says: str, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        plan_run(tiny_model("llama", tie_word_embeddings=True), build_method(make_recipe(RTN | keys)))
    assert len(str(caught.value)) <= 3 * 80


def test_a_router_is_no_match_of_an_override(tiny_model: Callable[..., Path]) -> None:
    keys = RTN | {"overrides": [{"match": "*.mlp.gate", "weights": "int8-row"}]}
    with pytest.raises(UsageError, match="matches only weights that stay uncompressed anyway"):
        plan_run(tiny_model("qwen3_moe"), build_method(make_recipe(keys)))


def test_quantize_and_compare_refuse_before_anything_is_written(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny_model("llama", tie_word_embeddings=True), tmp_path / "out"
    with pytest.raises(UsageError, match="did you mean"):
        quantize_directory(model, out, make_recipe(RTN | {"skip": ["*.vproj"]}))
    file = tmp_path / "recipes.yaml"
    file.write_text("a: {weights: int4-g16, quantizer: rtn, skip: ['*.vproj']}\n")
    candidates, _ = read_candidates(file, [4])
    with pytest.raises(UsageError, match=r"^a: skip: '\*\.vproj' matches no weight"):
        compare_recipes(model, out, candidates, {"text": "builtin:heldout"}, tokens=64, length=32)
    assert not out.exists()
