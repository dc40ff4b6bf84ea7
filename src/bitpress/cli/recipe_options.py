"""The method of a command's options: a file or a preset first, then single options, then --set."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.cli.screen import print_json
from bitpress.errors import UsageError

if TYPE_CHECKING:
    from bitpress.recipes import Method

__all__ = ["explain_preset", "read_method"]


def read_method(
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
    embeddings: str | None = None,
    head: str | None = None,
    runtime: str | None = None,
    scheme: str | None = None,
    inputs: str | None = None,
    tune: list[str] | None = None,
) -> "Method":
    """Build the recipe and the method of it, with what a runtime can load where nothing is said. Raises UsageError, FormatError."""
    from bitpress.pipeline.for_runtime import choose_for
    from bitpress.presets import preset_names
    from bitpress.recipes import choose_method

    if file is not None and preset is None and bits is None and file.name.lower() in preset_names() and not file.exists():
        raise UsageError(f"--recipe {file}: no such file. That is a preset: --preset {file.name.lower()} --bits 4.")
    said = {"embeddings": embeddings, "head": head}
    weights, bits, outer = choose_for(
        runtime, bits, weights, said, named=file is not None or preset is not None or scheme is not None
    )
    return choose_method(
        file,
        preset=preset,
        scheme=scheme,
        bits=bits,
        weights=weights,
        quantizer=quantizer,
        inputs=inputs,
        tune=tune,
        calibration={"text": text, "samples": samples, "length": length, "seed": seed},
        skip=skip or (),
        outer=outer,
        sets=sets or (),
        option="--{}".format,
    )


def explain_preset(
    file: Path | None, preset: str | None, bits: int | None, as_json: bool, others: Mapping[str, Any] | None = None
) -> None:
    """Print a preset's recipe and the reason for it. Raises UsageError where `others`, options by name that change the recipe, have a value."""
    from bitpress.cli.listings import show_preset
    from bitpress.presets import DEFAULT_PRESET, find_preset, preset_keys

    if idle := [name for name, value in (others or {}).items() if value]:
        raise UsageError(f"--explain prints the recipe of a preset; {', '.join(idle)} would change that recipe: leave it out.")
    preset_keys(preset, bits, beside_recipe=file is not None, option="--{}".format)
    if bits is None:
        raise UsageError("--explain needs --bits, and --preset for another preset than balanced.")
    found = find_preset(preset or DEFAULT_PRESET, bits)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show_preset(found)
