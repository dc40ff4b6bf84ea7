"""Presets: which recipe to take for a number of bits, chosen from what `bitpress compare` measured.

presets.json, which `python benchmarks/methods.py --presets` writes from the rows of the bench, holds the rule of every preset, its
choice at every width with the figures, and the recipes that it was chosen over.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bitpress.errors import UsageError, unknown_name

__all__ = ["Figures", "Preset", "find_preset", "preset_keys", "preset_names"]


@dataclass(frozen=True)
class Figures:
    """What a recipe gave on the bench: stored bits a weight, KL from the original in nats a token by text, seconds of pressing."""

    name: str
    bits: float
    kl: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Preset:
    """A choice. `recipe` holds keys of a recipe; `others` are the nearest that the rule allows, in the order of their mean KL."""

    name: str
    bits: int
    rule: str
    bench: str
    recipe: Mapping[str, Any]
    chosen: Figures
    others: tuple[Figures, ...]


def preset_names() -> list[str]:
    return list(_table()["rules"])


def find_preset(name: str, bits: int) -> Preset:
    """Give the choice of a preset at a width. Raises UsageError for names and widths that there are not."""
    table = _table()
    if name not in table["rules"]:
        raise unknown_name("preset", name, table["rules"])
    choices = table["choices"][name]
    if str(bits) not in choices:
        raise UsageError(f"preset {name} has no recipe of {bits} bits; it has {', '.join(choices)}.")
    choice = choices[str(bits)]
    others = tuple(Figures(**other) for other in choice["others"])
    return Preset(name, bits, table["rules"][name], table["bench"], choice["recipe"], Figures(**choice["chosen"]), others)


def preset_keys(name: str | None, bits: int | None, *, beside_recipe: bool) -> dict[str, Any]:
    """Give the keys of a recipe that a preset sets, none where none is asked for.

    Raises UsageError for a preset beside a recipe, for one of name and bits alone, and what `find_preset` raises.
    """
    if name is not None and beside_recipe:
        raise UsageError(
            "--preset and --recipe: give one of them; `--preset NAME --explain --json` prints a recipe to start from."
        )
    if (name is None) != (bits is None):
        raise UsageError("--preset and --bits go together, for example --preset balanced --bits 3.")
    return {} if name is None or bits is None else dict(find_preset(name, bits).recipe)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("bitpress").joinpath("presets.json").read_text(encoding="utf-8"))
    return table
