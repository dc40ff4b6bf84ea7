"""The recipe that the options of a command say: a file or a preset first, then single options, then --set."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.cli.screen import print_json
from bitpress.errors import UsageError

if TYPE_CHECKING:
    from bitpress.recipes import Recipe

__all__ = ["build_recipe", "explain_preset"]


def build_recipe(
    file: Path | None,
    preset: str | None,
    bits: int | None,
    weights: str | None,
    quantizer: str | None,
    sets: list[str] | None,
    text: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    skip: list[str] | None,
) -> "Recipe":
    """Build the recipe. Raises UsageError, FormatError."""
    from bitpress.presets import preset_keys
    from bitpress.recipes import Recipe, make_recipe

    values = preset_keys(preset, bits, beside_recipe=file is not None)
    if file is not None:
        values = Recipe.load(file).model_dump(exclude_unset=True)
    if weights is not None:
        values["weights"] = weights
    if quantizer is not None:
        values["quantizer"] = {"name": quantizer}
    given: dict[str, Any] = {"text": text, "samples": samples, "length": length, "seed": seed}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        values["calibration"] = {**values.get("calibration", {}), **given}
    if skip:
        values["skip"] = [*values.get("skip", ()), *skip]
    return make_recipe(values, sets or ())


def explain_preset(file: Path | None, preset: str | None, bits: int | None, as_json: bool) -> None:
    """Print what a preset takes, and why."""
    from bitpress.cli.reports import show_preset
    from bitpress.presets import find_preset, preset_keys

    preset_keys(preset, bits, beside_recipe=file is not None)
    if preset is None or bits is None:
        raise UsageError("--explain says why a preset takes its recipe: give --preset and --bits too.")
    found = find_preset(preset, bits)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show_preset(found)
