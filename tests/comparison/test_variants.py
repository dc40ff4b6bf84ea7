"""Recipes of a comparison: names, widths, what is shared, and every way to get them wrong in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.comparison.variants import read_candidates
from bitpress.errors import BitpressError, UsageError
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import build_method

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str) -> Path:
        path = tmp_path / "recipes.yaml"
        path.write_text(text)
        return path

    return make


def labels(path: Path, widths: list[int], **settings: Any) -> list[str]:
    return [candidate.label for candidate in read_candidates(path, widths, **settings)[0]]


def test_the_quantizer_says_at_which_widths(write: Write) -> None:
    path = write("awq: {weights: 'int{bits}-g16', quantizer: awq}\ngptq: {weights: 'int{bits}-g16'}\n")
    assert QUANTIZERS["awq"].bits == (3, 4)
    made, notes = read_candidates(path, [8, 4, 3, 2])
    assert [c.label for c in made] == ["awq, 4 bits", "awq, 3 bits", "gptq, 4 bits", "gptq, 3 bits", "gptq, 2 bits"]
    assert [c.recipe.weights for c in made[:2]] == ["int4-g16", "int3-g16"]
    assert notes == ["not meant for these bits and left out: awq at 8, 2; gptq at 8"]


def test_a_recipe_says_at_which_widths(write: Write) -> None:
    path = write("rtn: {weights: 'int{bits}-g16', quantizer: rtn, bits: [8, 2]}\nonce: {weights: int4-g16}\nat3: {bits: 3}\n")
    assert labels(path, [4, 3, 2]) == ["rtn, 2 bits", "once", "at3, 3 bits"]
    assert labels(path, [8]) == ["rtn, 8 bits", "once"]


def test_a_recipe_says_what_its_keys_are_at_each_width(write: Write) -> None:
    path = write(
        "higgs: {quantizer: higgs, bits: {4: {weights: 'gauss8x2-g16'}, 2: {weights: 'gauss{bits}-g16', quantizer: rtn}}}"
    )
    made, notes = read_candidates(path, [4, 3, 2])
    found = [(c.bits, c.recipe.weights, c.recipe.quantizer["name"]) for c in made]
    assert found == [(4, "gauss8x2-g16", "higgs"), (2, "gauss2-g16", "rtn")]
    assert notes == ["not meant for these bits and left out: higgs at 3"]


def test_the_width_goes_into_any_text(write: Write) -> None:
    path = write("a: {quantizer: {name: bitstack, terms: '{bits}'}, weights: binary-tensor, skip: ['*.{bits}.*']}\n")
    (made,), _ = read_candidates(path, [3])
    assert build_method(made.recipe).quantizer.part.terms == 3
    assert made.recipe.skip == ("*.3.*",)


def test_inputs_are_the_originals_unless_somebody_says_otherwise(write: Write) -> None:
    path = write("a: {}\nb: {calibration: {inputs: pressed, seed: 5}}\nc: {quantizer: gptaq}\n")
    made, notes = read_candidates(path, [4], {"samples": 7})
    assert [c.recipe.calibration.inputs for c in made] == ["original", "pressed", "pressed"]
    assert [c.recipe.calibration.samples for c in made] == [7, 7, 7]
    assert [c.recipe.calibration.seed for c in made] == [0, 5, 0]
    assert notes == ["run on the compressed model's inputs, as they ask for them: c"]
    made, notes = read_candidates(path, [4], {"inputs": "pressed"})
    assert {c.recipe.calibration.inputs for c in made} == {"pressed"}
    assert notes == []


def test_a_directory_holds_a_recipe_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("weights: 'int{bits}-g16'\n")
    (tmp_path / "a.yml").write_text("quantizer: {name: rtn}\n")
    (tmp_path / "notes.txt").write_text("no recipe")
    assert labels(tmp_path, [4, 3]) == ["a", "b, 4 bits", "b, 3 bits"]
    assert labels(tmp_path / "b.yaml", [4]) == ["b, 4 bits"], "a file that is one recipe"
    (tmp_path / "a.yaml").write_text("quantizer: gptq\n")
    with pytest.raises(UsageError, match="two recipes are called 'a'"):
        labels(tmp_path, [4])


def test_some_of_the_recipes(write: Write) -> None:
    path = write("gptq: {}\ngptq + lqer: {corrections: [lqer]}\nrtn: {quantizer: rtn}\n")
    assert labels(path, [4], only=["gptq*"]) == ["gptq", "gptq + lqer"]
    with pytest.raises(UsageError, match="no recipe is called 'gtpq'; there are gptq, gptq \\+ lqer, rtn"):
        labels(path, [4], only=["gtpq"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "recipes are a mapping"),
        ("", "recipes are a mapping"),
        ("a: [", "is not YAML"),
        ("a: {}\na: {}\n", "is not YAML: the key 'a' is given twice"),
        ("a: {weights: int4-g16, weights: int3-g16}\n", "the key 'weights' is given twice"),
        ("a: gptq\n", "a: a recipe is a mapping"),
        ("3: {}\n", "3 is no name"),
        ("'': {}\n", "'' is no name"),
        ("'a\tb': {}\n", "is no name"),
        ("a: {bits: [0]}\n", r"a: bits: \[0\] is no list of whole numbers"),
        ("a: {bits: 2.5}\n", "a: bits: 2.5 is no list"),
        ("a: {bits: {4: int4}}\n", "a: bits: say for each width"),
        ("a: {bits: [5]}\n", "no recipe is meant for 4 bits"),
        ("a: {quantizer: gtpq}\n", "a: unknown quantizer 'gtpq'. Did you mean 'gptq'"),
        ("a: {weights: 'int{bits}-g64', quantizer: gtpq}\n", "a at 4 bits: unknown quantizer 'gtpq'"),
        ("a: {quantizer: {name: [1]}}\n", "a: unknown quantizer"),
        ("a: {weight: int4}\n", "a: unknown key of the recipe 'weight'. Did you mean 'weights'"),
        ("a: {weights: imt4-g64}\n", "a: unknown number grid 'imt4'"),
        ("a: {quantizer: {name: gptq, dump: 1}}\n", "unknown setting of quantizer 'gptq' 'dump'. Did you mean 'damp'"),
        ("a: {calibration: 3}\n", "a: recipe: calibration"),
        ("a: {compute: bf16}\n", "a: compute: bf16 is not what all are compared in"),
        ("a: {quantizer: gptaq, calibration: {inputs: original}}\n", r"a: cross .* calibration\.inputs must be pressed"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_it(text: str, says: str, write: Write) -> None:
    with pytest.raises(BitpressError, match=says) as wrong:
        read_candidates(write(text), [4], compute="fp32")
    assert wrong.value.exit_code == 2
    assert "\n" not in str(wrong.value)
    assert "recipes.yaml" in str(wrong.value)


def test_a_missing_file_and_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: does not exist"):
        read_candidates(tmp_path / "none.yaml", [4])
    with pytest.raises(UsageError, match="holds no recipe"):
        read_candidates(tmp_path, [4])


def test_the_bench_has_a_recipe_for_every_width_it_asks_for() -> None:
    made, _ = read_candidates(Path(__file__).resolve().parents[2] / "benchmarks" / "methods.yaml", [4, 3, 2])
    assert {"gptq, 4 bits", "gptq, 3 bits", "gptq, 2 bits", "hadamard + gptq + lqer, 3 bits"} <= {c.label for c in made}


def test_a_learned_recipe_follows_the_compressed_model(write: Write) -> None:
    """It learns on the outputs of compressed blocks, whatever the others are calibrated on."""
    made, notes = read_candidates(write("plain: {weights: int4-g16}\nlearned: {weights: int4-g16, tuning: [signround]}\n"), [4])
    assert [c.recipe.calibration.inputs for c in made] == ["original", "pressed"]
    assert notes == ["run on the compressed model's inputs, as they ask for them: learned"]
