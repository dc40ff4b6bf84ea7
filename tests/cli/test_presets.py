"""Presets: every choice is a recipe, the explanation says why, and wrong wishes are refused in one line before any work."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import bitpress
from bitpress.cli.app import app
from bitpress.cli.recipe_options import read_method
from bitpress.errors import UsageError
from bitpress.formats import parse_format
from bitpress.presets import find_preset, preset_names
from bitpress.recipes import build_method, load_recipe, make_recipe

CHOICES = [(name, bits) for name in ("fast", "balanced", "best") for bits in (4, 3, 2)]


@pytest.mark.parametrize(("name", "bits"), CHOICES)
def test_every_choice_is_a_recipe_of_its_width(name: str, bits: int) -> None:
    preset = find_preset(name, bits)
    recipe = make_recipe(preset.recipe)
    assert parse_format(recipe.weights).grid.code_bits / parse_format(recipe.weights).grid.span <= bits
    assert bits <= preset.chosen.bits <= bits + 0.5
    means = [sum(figures.kl.values()) for figures in (preset.chosen, *preset.others)]
    assert means == sorted(means), "the least KL is chosen"


def test_a_preset_with_more_patience_is_no_worse() -> None:
    for bits in (4, 3, 2):
        fast, balanced, best = (sum(find_preset(name, bits).chosen.kl.values()) for name in ("fast", "balanced", "best"))
        assert best <= balanced <= fast
    assert not build_method(make_recipe(find_preset("fast", 4).recipe)).needs
    assert preset_names() == ["fast", "balanced", "best"]


def run(*arguments: str) -> tuple[int, str]:
    made = CliRunner().invoke(app, ["quantize", "nowhere", "out", *arguments])
    if isinstance(made.exception, UsageError):
        return made.exception.exit_code, str(made.exception)
    return made.exit_code, made.output


def test_the_explanation_names_recipe_rule_figures_and_others(tmp_path: Path) -> None:
    code, text = run("--preset", "best", "--bits", "3", "--explain")
    preset = find_preset("best", 3)
    assert code == 0
    assert preset.chosen.name in text
    assert preset.others[0].name in text
    assert f"{preset.chosen.bits:.3f}" in text
    kept = tmp_path / "recipe.yaml"
    kept.write_text(text[text.index("weights:") :])
    assert load_recipe(kept) == make_recipe(preset.recipe)
    code, text = run("--preset", "best", "--bits", "3", "--explain", "--json")
    assert code == 0
    assert json.loads(text)["recipe"] == yaml.safe_load(json.dumps(preset.recipe))


def test_python_takes_presets_too(tmp_path: Path) -> None:
    for keys, wanted in (
        ({"preset": "fast"}, "preset fast needs bits; it has"),
        ({"bits": 4, "recipe": {"weights": "int8-row"}}, "bits 4 and recipe both say the number format"),
        ({"bits": 4, "weights": "int8-row"}, "bits 4 and weights both say"),
        ({"preset": "fast", "bits": 9}, "preset fast has no recipe of 9 bits"),
        ({"preset": "fast", "bits": 4, "recipe": {}}, "give one of them"),
    ):
        with pytest.raises(UsageError, match=wanted):
            bitpress.quantize("nowhere", tmp_path / "out", **keys)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitpress.api.open_to_quantize", lambda model, progress, **_: Path(model))
        patch.setattr("bitpress.api.quantize_directory", lambda model, out, method, **rest: seen.append(method.recipe))
        bitpress.quantize("nowhere", tmp_path / "out", preset="best", bits=3, weights="int3-g128-zero")
        bitpress.quantize("nowhere", tmp_path / "out", bits=3, recipe={"skip": ["*.v_proj"]})
        bitpress.quantize("nowhere", tmp_path / "out", bits=3, recipe={"quantizer": {"name": "rtn"}})
    assert seen == [
        make_recipe({**find_preset("best", 3).recipe, "weights": "int3-g128-zero"}),
        make_recipe({**find_preset("balanced", 3).recipe, "skip": ["*.v_proj"]}),
        make_recipe({"weights": "int3-g64-zero", "quantizer": {"name": "rtn"}}),
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_bits_alone_are_the_preset_balanced(bits: int) -> None:
    code, text = run("--bits", str(bits), "--explain", "--json")
    assert code == 0
    assert json.loads(text)["recipe"] == yaml.safe_load(json.dumps(find_preset("balanced", bits).recipe))
    assert read_method(None, None, bits, *[None] * 8).recipe == make_recipe(find_preset("balanced", bits).recipe)
    assert read_method(None, "Balanced", bits, *[None] * 8).recipe == make_recipe(find_preset("balanced", bits).recipe)


def test_bits_beside_a_quantizer_are_its_format() -> None:
    recipe = read_method(None, None, 3, None, "GPTQ", *[None] * 6).recipe
    assert recipe == make_recipe({"weights": "int3-g64-zero", "quantizer": "gptq", "embeddings": "auto", "head": "auto"})


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--preset", "better", "--bits", "3"), "unknown preset 'better'"),
        (("--preset", "best", "--bits", "9"), "preset best has no recipe of 9 bits; it has 5, 4, 3, 2"),
        (("--preset", "best"), "--preset best needs --bits; it has 5, 4, 3, 2"),
        (("--bits", "9"), "preset balanced has no recipe of 9 bits; it has 5, 4, 3, 2"),
        (("--bits", "8"), "for 8 bits take weights int8-row"),
        (("--bits", "0"), "it has 5, 4, 3, 2"),
        (("--bits", "-4"), "it has 5, 4, 3, 2"),
        (("--bits", "4", "--weights", "int4-g32"), "--bits 4 and --weights both say the number format"),
        (("--bits", "4", "--set", "weights=int8-row"), "--bits 4 and --weights both say the number format"),
        (("--bits", "4", "--recipe", "some.yaml"), "--bits 4 and --recipe both say the number format"),
        (("--bits", "9", "--quantizer", "gptq"), "there are 2 to 8"),
        (("--recipe", "balanced"), "That is a preset: --preset balanced --bits 4"),
        (("--recipe", "gptq"), "nearest here: weights int4-g128 with quantizer gptq"),
        (("--recipe", "rtn"), "That is a quantizer: --quantizer rtn"),
        (("--preset", "q4_k_m", "--bits", "4"), "nearest here: weights q4_k"),
        (("--preset", "best", "--bits", "3", "--recipe", "some.yaml"), "--preset and --recipe: give one of them"),
        (("--explain",), "--explain needs --bits"),
    ],
)
def test_wrong_wishes_are_refused(arguments: tuple[str, ...], wanted: str) -> None:
    code, text = run(*arguments)
    assert code == 2
    assert wanted in text
