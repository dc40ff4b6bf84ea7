"""The method of what a user asked for: a file, a mapping or a preset first, then single settings, then KEY=VALUE texts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitpress.errors import UsageError
from bitpress.presets import preset_keys
from bitpress.recipes.method import Method
from bitpress.recipes.named_recipes import NAMED_RECIPES
from bitpress.recipes.parts import spelled
from bitpress.recipes.recipe import OUTER, Recipe
from bitpress.recipes.schemes import scheme_keys
from bitpress.recipes.text import load_recipe, make_method

__all__ = ["choose_method"]


def choose_method(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    preset: str | None = None,
    scheme: str | None = None,
    bits: int | None = None,
    weights: str | None = None,
    quantizer: str | Mapping[str, Any] | None = None,
    inputs: str | Mapping[str, Any] | None = None,
    tune: Sequence[str | Mapping[str, Any]] | None = None,
    calibration: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    outer: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    option: Callable[[str], str] = str,
) -> Method:
    """Build the recipe and the method of it. Raises UsageError, FormatError.

    scheme        one of `SCHEMES`: weights and inputs together; what else is said replaces its keys
    inputs        a format, or what the recipe's key `inputs` says
    tune          what is learned of every block, in this order: names, or names with settings
    recipe        a recipe, a YAML file or a name of one, or keys; keys alone stand beside a preset, and are the stronger ones
    calibration   settings of it that replace the recipe's; those that are None do not
    outer         what the recipe's keys `embeddings` and `head` say; those that are None change nothing, and are "auto" without a recipe
    skip          patterns after the recipe's own
    option        returns the caller's spelling of an option, for messages
    """
    own = dict(recipe) if isinstance(recipe, Mapping) else {}
    is_whole = recipe is not None and not isinstance(recipe, Mapping)
    rivals = [name for name, said in (("preset", preset is not None), ("bits", bits is not None), ("recipe", is_whole)) if said]
    if scheme is not None and rivals:
        raise UsageError(f"{option('scheme')} and {option(rivals[0])} both say what weights are; give one of them.")
    said = {text.partition("=")[0].strip() for text in sets} | own.keys()
    whole = recipe is not None and (not isinstance(recipe, Mapping) or preset is not None)
    names_quantizer = quantizer is not None or not said.isdisjoint({"quantizer", "quantizer.name"})
    values = preset_keys(
        preset,
        bits,
        beside_recipe=whole or "weights" in own,
        weights=weights is not None or "weights" in said,
        quantizer=names_quantizer,
        option=option,
    )
    usual = not names_quantizer and (bool(values) or scheme is not None or _is_named(recipe))
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(exclude_unset=True)
    elif isinstance(recipe, (str, Path)):
        values = load_recipe(recipe).model_dump(exclude_unset=True)
    values = (values if scheme is None else scheme_keys(scheme)) | own
    named = {"inputs": inputs, "weights": weights, "quantizer": quantizer, "tuning": list(tune) if tune else None}
    values |= {key: value for key, value in named.items() if value is not None}
    if chosen := {key: value for key, value in (calibration or {}).items() if value is not None}:
        values["calibration"] = {**values.get("calibration", {}), **chosen}
    if skip:
        values["skip"] = [*values.get("skip", ()), *skip]
    if recipe is None:
        values = {**dict.fromkeys(OUTER, "auto"), **values}
    values |= {key: value for key, value in (outer or {}).items() if value is not None}
    return make_method(values, sets, usual=usual)


def _is_named(recipe: object) -> bool:
    """Whether a recipe is one of `NAMED_RECIPES`, and not the user's file."""
    if not isinstance(recipe, (str, Path)) or Path(recipe).exists():
        return False
    return spelled(str(recipe), NAMED_RECIPES) in NAMED_RECIPES
