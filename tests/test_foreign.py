"""Names of other tools: every example finds its row, and every suggestion is a recipe here."""

import dataclasses
import re
from typing import Any

import pytest

from bitpress.corrections.table import CORRECTIONS
from bitpress.errors import BitpressError, UsageError, fold
from bitpress.foreign import FOREIGN, find_foreign, foreign_hint
from bitpress.formats import GRIDS, SHORT, find_format
from bitpress.formats.table import spell_format
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import Recipe, build_method, load_recipe, make_recipe
from bitpress.recipes.schemes import scheme_keys
from bitpress.transforms.table import TRANSFORMS
from bitpress.tuning.table import TUNINGS

EXAMPLES = [(row, name) for row in FOREIGN for name in row.examples]


@pytest.mark.parametrize(("row", "name"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_suggestion_is_a_recipe(row: Any, name: str) -> None:
    found = find_foreign(name)
    assert found is not None
    assert found[0] is row
    keys = {"weights": found[1], "transforms": []} | ({} if row.quantizer is None else {"quantizer": row.quantizer})
    recipe = make_recipe(keys)
    assert recipe.weights == find_format(found[1]).name
    hint = foreign_hint(name)
    assert hint is not None
    assert f"weights {found[1]}" in hint
    assert len(hint) < 200
    kinds = {"scheme": scheme_keys, "recipe": load_recipe, "inputs": find_format, "tune": lambda word: TUNINGS[word]}
    for option, word in re.findall(r"--(\w+) ([\w-]+)", hint):
        assert option == "bits" or kinds[option](word)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("q4_k_m", "q4_k"),
        ("Q8_K", "q8_0"),
        ("IQ3_M", "q3_k"),
        ("awq", "int4-g128-zero"),
        ("gptq", "int4-g128"),
        ("W4A16", "int4-g128"),
        ("W8A8", "int8-row"),
        ("int4wo", "int4-g128-zero"),
        ("nf4", "nf4-g64"),
        ("fp8", "e4m3-row"),
        ("fp4", "fp4bnb-g64"),
        ("bnb-4bit", "nf4-g64"),
        ("4bit", "int4-g64-zero"),
        ("4.0bpw", "int4-g64-zero"),
        ("q4f16_1", "int4-g32"),
    ],
)
def test_a_foreign_name_in_any_place_says_what_is_nearest(name: str, weights: str) -> None:
    places: list[dict[str, Any]] = [{"weights": name}, {"overrides": [{"match": "*", "weights": name}]}]
    if fold(name) not in map(fold, QUANTIZERS):
        places += [{"quantizer": name}, {"overrides": [{"match": "*", "quantizer": name}]}]
    if name == "nf4":
        places = places[2:]  # a grid here, and only its block is missing
    for keys in places:
        with pytest.raises(BitpressError) as caught:
            make_recipe(keys)
        assert f"nearest here: weights {weights}" in str(caught.value)
    with pytest.raises(UsageError, match=f"nearest here: weights {weights}"):
        load_recipe(name)


def test_what_is_a_name_here_is_none_of_another_tool() -> None:
    assert foreign_hint("int4-g64-zero") is None
    assert foreign_hint("gtpq") is None
    for name in ("nvfp4", "mxfp4", "mxfp8", "q4_0", "q4_k", "iq4_nl", "tq1_0"):
        assert make_recipe({"weights": name.upper()}).weights == find_format(name).name


def test_names_are_found_in_any_case_and_no_two_are_alike() -> None:
    short = [name for name in SHORT if name not in GRIDS and name != "iq4_nl"]  # the grid iq4nl in llama.cpp's only block
    for table in (QUANTIZERS, TRANSFORMS, CORRECTIONS, [*GRIDS, *short]):
        assert len({fold(name) for name in table}) == len(table)
    for name in QUANTIZERS:
        recipe = make_recipe({"quantizer": name.upper().replace("_", "-"), "transforms": []})
        assert recipe.quantizer_name == name
    for name in (*(row.in_block("g64") for row in GRIDS.values()), *SHORT, "e4m3b7-row", "pvq4k2-g4"):
        assert spell_format(name.upper().replace("-", "_")) == name
    for name in TRANSFORMS:
        assert (
            build_method(make_recipe({"transforms": [name.upper()], "inputs": "int8-row", "keys": "int8-row"})).resolved()[
                "transforms"
            ][0]["name"]
            == name
        )
    assert make_recipe({"weights": "DFloat11", "transforms": []}).weights == "dfloat11"


BAD: tuple[Any, ...] = ("x", "", -1, 1.5, None, True, float("nan"), float("inf"), [1], {"a": 1}, 10**30)


def test_no_setting_answers_in_the_words_of_the_checker() -> None:
    """Every setting of every part, and every key of a recipe, under values of every type."""
    given: list[dict[str, Any]] = [{key: bad} for key in Recipe.model_fields for bad in (*BAD, [{"a": 1}], [None])]
    for bad in BAD:
        given += [{"calibration": {key: bad}} for key in ("text", "samples", "length", "seed", "chat", "inputs", "sequential")]
    for bad in ("x", -1, None, float("inf"), [1]):
        for kind, table in (("quantizer", QUANTIZERS), ("transforms", TRANSFORMS), ("corrections", CORRECTIONS)):
            for name, part in table.items():
                for field in dataclasses.fields(part):
                    one = {"name": name, field.name: bad}
                    given.append({kind: one if kind == "quantizer" else [one]})
    refused = 0
    for keys in given:
        try:
            make_recipe(keys)
        except BitpressError as error:
            refused += 1
            said = str(error)
            assert "\n" not in said
            assert len(said) <= 3 * 80, said
            for raw in ("Input should", "Value error", "unable to parse", "pydantic", "valid string", "[type="):
                assert raw not in said, said
    assert refused > len(given) / 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("calibration.sample=4", "Did you mean 'samples'?"),
        ("calibration.Samples=4", "Did you mean 'samples'?"),
        ("calibraton.samples=4", "Did you mean 'calibration'?"),
        ("samples=4", "Did you mean 'calibration.samples'?"),
        ("damp=0.1", "Did you mean 'quantizer.damp'?"),
        ("quantizer.dammp=0.1", "Did you mean 'damp'?"),
        ("quantizer.order=activations", "Did you mean 'activation'?"),
        ("calibration.inputs=orig", "Did you mean 'original'?"),
        ("compute=BF-16", "Did you mean 'bf16'?"),
        ("quantizer=lqer", "that is a correction; it goes under corrections"),
        ("quantizer=int4-g64", "That is a number format: weights int4-g64"),
        ("weights=boa", "that is a quantizer; write quantizer boa"),
        ("weights=", "weights: a text is needed"),
        ("overrides=[{match: a, weight: int4-g64}]", "Did you mean 'weights'?"),
        ("transforms=[hadamar]", "Did you mean 'hadamard'?"),
        ("calibration..samples=4", "write KEY=VALUE"),
        ("weights=2026-13-45", "is not a YAML value"),
        ("skip=*.v_proj", "skip: a list is needed"),
    ],
)
def test_what_was_meant_is_said(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe({}, [text])
    assert says in str(caught.value)
