"""Candidates: the recipes of a comparison, each at every width that it is meant for.

    rtn:     {weights: "int{bits}-g64-zero", quantizer: rtn, bits: [4, 3, 2]}
    gptq:    {weights: "int{bits}-g64-zero"}
    higgs:   {quantizer: higgs, bits: {4: {weights: gauss8x2-row}, 2: {weights: gauss4x2-row}}}

A file maps names to recipes; in a directory every file is one recipe, named by its stem. `{bits}` stands for the width in any text
of a recipe, and one without it is run once, as of the width that `bits` names if that is a single one. `bits` lists the widths that a
recipe is meant for, or says what its keys are at each; without it the quantizer's own range decides.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpress.calibration.stats import of_origin
from bitpress.errors import BitpressError, UsageError
from bitpress.faults import read_yaml
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import DEFAULT_QUANTIZER, Method, Recipe, make_method, spelled
from bitpress.recipes.method import compute_dtype

__all__ = ["Variant", "read_candidates"]

PLACE = "{bits}"
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, eq=False)
class Variant:
    """`bits` is the width that took the place of `{bits}`, or the only one that the recipe is meant for; None where there is none."""

    name: str
    bits: int | None
    method: Method

    @property
    def recipe(self) -> Recipe:
        return self.method.recipe

    @property
    def label(self) -> str:
        return self.name if self.bits is None else f"{self.name}, {self.bits} bits"


def read_candidates(
    path: Path,
    widths: Sequence[int],
    calibration: Mapping[str, Any] | None = None,
    *,
    compute: str = "auto",
    only: Sequence[str] = (),
) -> tuple[list[Variant], list[str]]:
    """Read recipes and build them at the widths they are meant for; give also what is worth a line.

    `calibration` holds what a recipe does not say itself; inputs are the original's unless somebody says otherwise, or the method
    compares both models' inputs. Raises UsageError and FormatError that name the recipe.
    """
    found = _read(path)
    for pattern in only:
        if not fnmatch.filter(found, pattern):
            raise UsageError(f"{path}: no recipe is called {pattern!r}; there are {', '.join(found)}.")
    found = {name: values for name, values in found.items() if not only or any(fnmatch.fnmatchcase(name, p) for p in only)}
    made: list[Variant] = []
    left_out: list[str] = []
    both: list[str] = []
    for name, given in found.items():
        chosen = _widths(f"{path}: {name}", given, widths)
        unmeant = [w for w in widths if w not in chosen] if None not in chosen else []
        if unmeant:
            left_out.append(f"{name} at {', '.join(map(str, unmeant))}")
        for width in chosen:
            try:
                method, follows = _build(_at(given, width), calibration or {}, compute)
            except BitpressError as error:
                raise type(error)(f"{path}: {name}{'' if width is None else f' at {width} bits'}: {error}") from error
            made.append(Variant(name, width, method))
            if follows and name not in both:
                both.append(name)
    if not made:
        raise UsageError(f"{path}: no recipe is meant for {', '.join(map(str, widths))} bits; give other --bits.")
    notes = [f"not meant for these bits and left out: {'; '.join(left_out)}"] * bool(left_out)
    notes += [f"run on the compressed model's inputs, as they ask for them: {', '.join(both)}"] * bool(both)
    return made, notes


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        raise UsageError(f"{path}: does not exist; give a YAML file of recipes, or a directory of them.")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UsageError(f"{path}: holds no recipe; a recipe is a .yaml file.")
        read = [(file.stem, _load(file)) for file in files]
    else:
        values = _load(path)
        single = set(values) <= {*Recipe.model_fields, "bits"}
        read = [(path.stem, values)] if single else list(values.items())
    found: dict[str, dict[str, Any]] = {}
    for name, recipe in read:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 60 or name != name.strip():
            raise UsageError(f"{path}: {name!r} is no name; names of recipes are texts of 1 to 60 characters in one line.")
        if name in found:
            raise UsageError(f"{path}: two recipes are called {name!r}.")
        if not isinstance(recipe, dict):
            raise UsageError(f"{path}: {name}: a recipe is a mapping of keys such as weights and quantizer.")
        found[name] = recipe
    return found


def _load(path: Path) -> dict[Any, Any]:
    values = read_yaml(path, "recipes are YAML files")
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{path}: recipes are a mapping of names to recipes, or the keys of one recipe.")
    return values


def _widths(where: str, values: Mapping[str, Any], widths: Sequence[int]) -> list[int | None]:
    """Say at which of the widths a recipe is to be run; [None] stands for once, whatever they are."""
    given = values.get("bits")
    meant = None
    if given is not None:
        meant = list(given) if isinstance(given, (list, dict)) else [given]
        if not meant or any(type(m) is not int or not 1 <= m <= 16 for m in meant):
            raise UsageError(f"{where}: bits: {given!r} is no list of whole numbers from 1 to 16.")
        if isinstance(given, dict) and not all(isinstance(keys, dict) and "bits" not in keys for keys in given.values()):
            raise UsageError(f"{where}: bits: say for each width which keys of the recipe it has.")
    if not _mentions(values) and not isinstance(given, dict):
        if meant is not None and len(meant) == 1:
            return [w for w in widths if w in meant]
        return [None] if meant is None or set(meant) & set(widths) else []
    if meant is not None:
        return [w for w in widths if w in meant]
    quantizer = values.get("quantizer", DEFAULT_QUANTIZER)
    name = quantizer.get("name", DEFAULT_QUANTIZER) if isinstance(quantizer, dict) else quantizer
    method = QUANTIZERS.get(spelled(name, QUANTIZERS)) if isinstance(name, str) else None
    if method is None:
        return list(widths[:1])  # building it says that the name is unknown
    least, most = method.bits
    return [w for w in widths if least <= w <= most]


def _mentions(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_mentions(v) for v in value.values())
    if isinstance(value, list):
        return any(_mentions(v) for v in value)
    return isinstance(value, str) and PLACE in value


def _at(values: Mapping[str, Any], width: int | None) -> dict[str, Any]:
    """Return the keys that a recipe has at a width."""
    own = values.get("bits")
    keys = {key: value for key, value in values.items() if key != "bits"}
    filled: dict[str, Any] = _fill(keys | own[width] if isinstance(own, dict) else keys, width)
    return filled


def _fill(value: Any, width: int | None) -> Any:
    if width is None:
        return value
    if isinstance(value, Mapping):
        return {key: _fill(v, width) for key, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, width) for v in value]
    return value.replace(PLACE, str(width)) if isinstance(value, str) else value


def _build(values: Mapping[str, Any], shared: Mapping[str, Any], compute: str) -> tuple[Method, bool]:
    """Build a recipe; say also whether it follows the compressed model only because its method has to."""
    own = values.get("calibration")
    calibration = {**shared, **(own if isinstance(own, dict) else {})}
    if own is not None and not isinstance(own, dict):
        return make_method(values), False  # which says what a calibration is
    said = isinstance(own, dict) and "inputs" in own
    # On the compressed model's inputs every method can run; what it needs says whether it must.
    first = make_method({"compute": compute, **values, "calibration": {**calibration, "inputs": "pressed"}})
    must = bool(of_origin(first.needs, "original") or first.tunings) or first.recipe.calibration.sequential or first.observes
    if not said:
        calibration["inputs"] = "pressed" if must else calibration.get("inputs", "original")
    method = make_method({"compute": compute, **values, "calibration": calibration})
    if method.compute != compute_dtype(compute):
        raise UsageError(f"compute: {method.recipe.compute} is not what all are compared in; leave it out and give --compute.")
    return method, must and not said and shared.get("inputs") != "pressed"
