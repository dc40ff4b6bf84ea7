"""Recipes as text: from YAML files, mappings and `KEY=VALUE`, and back; what is wrong is said with the key and the nearest name."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from bitpress.allocation.choices import CHOICES
from bitpress.calibration.observers import OBSERVERS
from bitpress.errors import UsageError, fold, shown, unknown_name
from bitpress.faults import parse_yaml, read_yaml, value_fault
from bitpress.foreign import foreign_hint
from bitpress.formats import OPERANDS, read_format
from bitpress.kernels.integers import told_product
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes.kinds import LISTS, table_of
from bitpress.recipes.method import Method, build_method
from bitpress.recipes.named_recipes import NAMED_RECIPES
from bitpress.recipes.parts import spelled
from bitpress.recipes.recipe import (
    AUTO_OUTER,
    DEFAULT_QUANTIZER,
    OUTER,
    Budget,
    Calibration,
    Choose,
    InputRounding,
    LayerSetting,
    OuterWeights,
    Override,
    Recipe,
)
from bitpress.recipes.rules import check_composition
from bitpress.transforms.table import CHANNEL_CHANGES

__all__ = ["dump_recipe", "load_recipe", "make_method", "make_recipe", "told_budget", "told_overrides", "told_weights"]


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML file, or return one of `NAMED_RECIPES`. Raises UsageError with the key that is wrong."""
    named = NAMED_RECIPES.get(spelled(str(path), NAMED_RECIPES))
    if named is not None and not Path(path).exists():
        return make_recipe(named.keys, where=str(path))
    return make_recipe(_read_file(Path(path)), where=str(path))


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_recipe` reads back, every default spelled out."""
    return yaml.safe_dump(build_method(recipe).resolved(), sort_keys=False)


def make_recipe(values: Mapping[str, Any] | None = None, sets: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Build a recipe from a mapping and `KEY=VALUE` texts with dotted keys. Raises UsageError, FormatError."""
    return make_method(values, sets, where).recipe


def make_method(
    values: Mapping[str, Any] | None = None, sets: Sequence[str] = (), where: str = "recipe", *, usual: bool = False
) -> Method:
    """Build a recipe and the method of it, as `make_recipe` does; `usual`: see `build_method`."""
    merged: dict[str, Any] = {key: value for key, value in (values or {}).items() if value is not None}
    for text in sets:
        _set_(merged, text)
    merged = _with_quantizer(merged)
    if isinstance(merged.get("overrides"), (list, tuple)):
        parts = [_with_quantizer(o) if isinstance(o, Mapping) else o for o in merged["overrides"]]
        merged["overrides"] = [
            _with_lists(_with_inputs(_with_format(f"{where}: overrides", o), keeps=True)) if isinstance(o, Mapping) else o
            for o in parts
        ]
    merged = _with_lists(merged)
    merged = _with_format(where, merged)
    for key in ("inputs", *OPERANDS):
        merged = _with_inputs(merged, key)
    for key in OUTER:
        if key in merged:
            merged[key] = _outer(f"{where}: {key}", merged[key])
    if "choose" in merged:
        merged["choose"] = _choose(f"{where}: choose", merged["choose"])
    if "budget" in merged:
        merged["budget"] = _budget(f"{where}: budget", merged["budget"])
        match merged["budget"].get("among"):
            case [str(first), *_]:  # stands for the recipe's own format, where that is not named
                merged.setdefault("weights", first)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise _usage(where, error, merged) from error
    for override in recipe.overrides:
        if all(part is None for part in (override.weights, override.quantizer, override.inputs, override.transforms)):
            raise UsageError(f"{where}: overrides: {override.match!r} names neither weights nor a quantizer nor inputs.")
    # Every part is built, so that a wrong name or value shows here and not after an hour.
    method = build_method(recipe, usual=usual)
    check_composition(method)
    return method


def told_weights(recipe: Mapping[str, Any]) -> str:
    """Name the format of a resolved recipe, and what overrides have instead: "e8p-row; *.v_proj int4-g64 by gptq"."""
    inputs = recipe.get("inputs")  # recipes of before have no such key
    said = {"inputs": inputs} | {key: recipe.get(key) for key in OPERANDS}
    is_plain = not any(recipe.get(key) for key in OPERANDS) and not _rounds_apart(recipe)
    how = "simulated" if inputs is None else told_product(recipe["weights"], inputs, native=is_plain)
    rounded = [
        f"{key} {_told_inputs(own)} ({how if key == 'inputs' else 'simulated'})" for key, own in said.items() if own is not None
    ]
    choice = recipe.get("choose")
    chosen = [] if choice is None else [f"each layer one of {len(choice['among'])} settings, by {choice['by']['name']}"]
    return "; ".join([told_budget(recipe) or recipe["weights"], *rounded, *chosen, *told_overrides(recipe)])


def _rounds_apart(recipe: Mapping[str, Any]) -> bool:
    """Whether channels of inputs are shifted, copied, averaged or clipped beside their rounding, which is no product of whole numbers."""
    changed = any(
        t["name"] == "reassemble" or (t["name"] in CHANNEL_CHANGES and t.get("place") != "folded") for t in recipe["transforms"]
    )
    return changed or any(t.get("shifts") or t.get("clip_inputs") for t in recipe.get("tuning", ()))


def told_budget(recipe: Mapping[str, Any]) -> str | None:
    """Say what the budget of a resolved recipe is: "3.3 bits of int2-g64, int3-g64"; None without one."""
    budget = recipe.get("budget")  # recipes of before have no such key
    return None if budget is None else f"{budget['bits']:g} bits of {', '.join(budget['among'])}"


def told_overrides(recipe: Mapping[str, Any]) -> list[str]:
    """Say what each override of a resolved recipe has: "*.v_proj int6-g64 by gptq (damp 0.05)", settings where the recipe has others."""
    told = []
    for override in recipe["overrides"]:
        parts, own = [override["match"], override.get("weights", "")], override.get("quantizer")
        rounded = override.get("inputs")
        if own is not None:
            usual = recipe["quantizer"] if recipe["quantizer"]["name"] == own["name"] else own
            settings = ", ".join(f"{key} {value}" for key, value in own.items() if usual[key] != value)
            parts.append(f"by {own['name']}{settings and f' ({settings})'}")
        if (changes := override.get("transforms")) is not None:
            parts.append(f"behind {', '.join(part['name'] for part in changes)}" if changes else "in its own basis")
        if rounded is not None:
            parts.append("inputs kept" if rounded == "keep" else f"inputs {_told_inputs(rounded)}")
        told.append(" ".join(part for part in parts if part))
    return told


def _told_inputs(inputs: Mapping[str, Any]) -> str:
    first = inputs.get("first")
    more = "" if first is None else f", first {first['share']:g} of the channels {first['format']}"
    return f"{inputs['format']} {inputs['parameters']}{more}"


def _with_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put parts that are listed by their names alone as their settings are given, and spell the names as the tables do."""
    lists = [key for key in LISTS if isinstance(values.get(key), (list, tuple))]
    parts = {key: [{"name": part} if isinstance(part, str) else part for part in values[key]] for key in lists}
    return {**values, **{key: [_with_name(part, table_of(key)) for part in parts[key]] for key in lists}}


def _with_quantizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put a quantizer that is given by its name alone as its settings are given, and spell the name as the table does."""
    given = values.get("quantizer")
    if given is None:
        return dict(values)
    return {**values, "quantizer": _with_name({"name": given} if isinstance(given, str) else given, QUANTIZERS)}


def _with_inputs(values: Mapping[str, Any], key: str = "inputs", *, keeps: bool = False) -> dict[str, Any]:
    """Put inputs that are given by a format alone as they are given in full, and names as the tables spell them; `keeps`: "keep" says more than
    nothing does."""
    given = values.get(key)
    if given == "keep" and not keeps:  # nothing to keep them from
        return {other: value for other, value in values.items() if other != key}
    if given is None or given == "keep":
        return dict(values)
    given = {"format": given} if isinstance(given, str) else given
    if isinstance(given, Mapping) and given.get("observer") is not None:
        observer = given["observer"]
        named = _with_name({"name": observer} if isinstance(observer, str) else observer, OBSERVERS)
        given = {**given, "observer": named}
    return {**values, key: given}


def _with_format(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Spell the name of a format as the tables do. Raises UsageError for a method that stands in its place."""
    given = values.get("weights")
    if not isinstance(given, str):
        return dict(values)
    method = spelled(given, QUANTIZERS)
    if method in QUANTIZERS and foreign_hint(given) is None:
        raise UsageError(
            f"{where}: weights {given!r}: that is a quantizer; write quantizer {method} and a number format such as int4-g64-zero."
        )
    return {**values, "weights": read_format(given).name}


def _outer(where: str, given: Any) -> Any:
    """Return what a key for a matrix outside the blocks says as its settings; "keep" and "auto" stand for themselves."""
    if given in ("keep", "auto"):
        return given
    values = {"weights": given} if isinstance(given, str) else given
    return _with_inputs(_with_format(where, _with_quantizer(values))) if isinstance(values, Mapping) else values


def _choose(where: str, given: Any) -> Any:
    """Return what the key `choose` says as its settings, names spelled as the tables do."""
    if not isinstance(given, Mapping):
        return given
    by = given.get("by")
    values = {**given, "by": _with_name({"name": by} if isinstance(by, str) else by, CHOICES)}
    if isinstance(given.get("among"), (list, tuple)):
        values["among"] = [
            _with_inputs(_with_format(where, own), keeps=True) if isinstance(own, Mapping) else own for own in given["among"]
        ]
    return values


def _budget(where: str, given: Any) -> dict[str, Any]:
    """Return what the key `budget` says as its settings, formats spelled as the tables do; a number alone is its bits."""
    if not isinstance(given, Mapping):
        return {"bits": given}
    if not isinstance(given.get("among"), (list, tuple)):
        return dict(given)
    return {**given, "among": [_with_format(where, {"weights": name})["weights"] for name in given["among"]]}


def _with_name(part: Any, table: Mapping[str, Any]) -> Any:
    named = isinstance(part, Mapping) and isinstance(part.get("name"), str)
    return {**part, "name": spelled(part["name"], table)} if named else part


def _usage(where: str, error: ValidationError, given: Mapping[str, Any]) -> UsageError:
    """Say what is wrong with the keys of a recipe, and what was meant."""
    at, wrong = value_fault(error)
    at = tuple(part for part in at if part not in (OuterWeights.__name__, InputRounding.__name__))
    if error.errors()[0]["type"] != "extra_forbidden":
        return UsageError(f"{where}: {'.'.join(map(str, at))}: {wrong}")
    path = [str(part) for part in at]
    *outer, key = path
    if not outer:
        deeper = {f"calibration.{name}": name for name in Calibration.model_fields}
        part = given.get("quantizer")
        name = part.get("name") if isinstance(part, Mapping) else None
        quantizer = QUANTIZERS.get(str(name or DEFAULT_QUANTIZER))
        own = () if quantizer is None else dataclasses.fields(cast(Any, quantizer))
        deeper |= {f"quantizer.{field.name}": field.name for field in own}
        meant = next((long for long, name in deeper.items() if fold(name) == fold(key)), None)
        if meant is not None:
            return UsageError(f"{where}: there is no key {key!r}. Did you mean {meant!r}?")
    tables: dict[str, type[BaseModel]] = {
        "calibration": Calibration,
        "overrides": Override,
        "budget": Budget,
        "choose": Choose,
        "among": LayerSetting,
        **dict.fromkeys(("inputs", *OPERANDS), InputRounding),
        **dict.fromkeys(OUTER, OuterWeights),
    }
    nearest_key = next((part for part in reversed(outer) if part in tables), None)
    known = (tables[nearest_key] if nearest_key is not None else Recipe).model_fields
    place = f"{where}: {'.'.join(path)}: " if outer else "" if where == "recipe" else f"{where}: "
    return UsageError(f"{place}{unknown_name(f'key of {nearest_key}' if outer else 'key of the recipe', key, known)}")


def _set_(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *parents, leaf = (part.strip() for part in key.split("."))
    if not equals or not all((*parents, leaf)):
        raise UsageError(f"--set {shown(text)}: write KEY=VALUE, for example quantizer.damp=0.05.")
    target = values
    for parent in parents:
        inner = target.get(parent, {})
        if isinstance(inner, str):
            outer = {"weights": AUTO_OUTER if inner == "auto" else inner}
            inner = outer if parent in OUTER else {"format": inner} if parent in ("inputs", *OPERANDS) else {"name": inner}
        if not isinstance(inner, dict):
            raise UsageError(f"--set {shown(text)}: {parent!r} has no settings.")
        target[parent] = dict(inner)
        target = target[parent]
    # A pattern such as *.v_proj is no YAML without quotes, and means itself.
    try:
        target[leaf] = value if value[:1] in ("*", "!") else parse_yaml(f"--set {shown(text)}", value)
    except UsageError as error:
        raise UsageError(f"--set {shown(text)}: {value!r} is not a YAML value.") from error


def _read_file(path: Path) -> dict[str, Any]:
    name = str(path)
    if not path.exists():
        hint = foreign_hint(name)
        if spelled(name, QUANTIZERS) in QUANTIZERS:
            hint = hint or f"That is a quantizer: --quantizer {spelled(name, QUANTIZERS)}."
        if hint is not None:
            raise UsageError(f"--recipe {name}: no such file. {hint}")
    values = read_yaml(path, f"a recipe is a YAML file or one of these names: {', '.join(NAMED_RECIPES)}")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys such as weights, quantizer, calibration.")
    return values
