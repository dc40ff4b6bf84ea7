"""Presets: the recipe for a number of bits, chosen from measurements of `bitpress compare`.

`python benchmarks/methods.py --presets` writes presets.json from the rows of the bench. It holds the rule of every preset, its choice for
every number of bits with the figures, and the recipes that it beat.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bitpress.errors import UsageError, fold, unknown_name
from bitpress.foreign import foreign_hint

__all__ = ["DEFAULT_PRESET", "Figures", "Preset", "find_preset", "preset_keys", "preset_names", "preset_widths"]

DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class Figures:
    """The figures of a recipe on the bench: stored bits per weight, KL in nats per token by text, seconds of quantizing."""

    name: str
    bits: float
    kl: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Preset:
    """A choice. `recipe` holds keys of a recipe; `others` are the next best that the rule allows, in the order of their mean KL."""

    name: str
    bits: int
    rule: str
    bench: str
    recipe: Mapping[str, Any]
    chosen: Figures
    others: tuple[Figures, ...]


def preset_names() -> list[str]:
    return list(_table()["rules"])


def preset_widths(name: str) -> list[int]:
    """Return the numbers of bits that a preset has a recipe of."""
    return [int(bits) for bits in _table()["choices"][_known(name)]]


def find_preset(name: str, bits: int) -> Preset:
    """Return the choice of a preset for a number of bits. Raises UsageError for unknown names and bits."""
    table = _table()
    name = _known(name)
    choices = table["choices"][name]
    if str(bits) not in choices:
        other = f"; for {bits} bits take weights int{bits}-row" if bits in (6, 7, 8) else ""
        raise UsageError(f"preset {name} has no recipe of {bits} bits; it has {', '.join(choices)}{other}.")
    choice = choices[str(bits)]
    others = tuple(Figures(**other) for other in choice["others"])
    # The bench is of the blocks; embeddings and head are as in every run without a recipe.
    recipe = {**choice["recipe"], "embeddings": "auto", "head": "auto"}
    return Preset(name, bits, table["rules"][name], table["bench"], recipe, Figures(**choice["chosen"]), others)


def preset_keys(
    name: str | None,
    bits: int | None,
    *,
    beside_recipe: bool = False,
    weights: bool = False,
    quantizer: bool = False,
    option: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Return the keys of a recipe that a preset sets; empty without a preset and bits.

    Bits alone mean the preset `DEFAULT_PRESET`; with a quantizer (`quantizer`) they choose its number format. Raises UsageError for a
    preset or bits with a recipe, for a preset without bits, for bits with another number format (`weights`), and the errors of
    `find_preset`. `option` returns the caller's spelling of an option.
    """
    if name is not None and beside_recipe:
        raise UsageError(
            f"{option('preset')} and {option('recipe')}: give one of them; `bitpress quantize --preset NAME --bits 4 --explain --json` prints "
            "a recipe to start from."
        )
    if bits is None:
        if name is not None:
            widths = ", ".join(map(str, preset_widths(name)))
            raise UsageError(f"{option('preset')} {_known(name)} needs {option('bits')}; it has {widths}.")
        return {}
    if name is None and (beside_recipe or weights):
        other = option("recipe" if beside_recipe else "weights")
        raise UsageError(f"{option('bits')} {bits} and {other} both say the number format; leave one of them out.")
    if name is None and quantizer:
        if not 2 <= bits <= 8:
            raise UsageError(
                f"{option('bits')} {bits} beside {option('quantizer')}: there are 2 to 8; name another number format by {option('weights')}."
            )
        return {"weights": f"int{bits}-g64-zero"}
    return dict(find_preset(name or DEFAULT_PRESET, bits).recipe)


def _known(name: str) -> str:
    rules: dict[str, str] = _table()["rules"]
    known = next((rule for rule in rules if fold(rule) == fold(name)), None)
    if known is None:
        raise unknown_name("preset", name, rules, foreign_hint(name))
    return known


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("bitpress").joinpath("presets.json").read_text(encoding="utf-8"))
    return table
