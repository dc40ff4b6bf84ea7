"""A recipe: everything that decides the bytes of a run, the same in Python, in YAML, on the command line and in the manifest.

weights: int4-g64-zero
transforms: [{name: awq-scale}]         what runs before; left out: what the quantizer's paper puts there
quantizer: {name: gptq, damp: 0.01}     without a name: channel scales and gptq, see `Recipe`
corrections: [{name: lqer, rank: 32}]   terms beside the codes: what is split off before the quantizer, what repairs its error after
calibration: {text: builtin, samples: 128, length: 512, seed: 0, chat: false,
              inputs: pressed,          or original: what the uncompressed blocks before give a block, instead of the compressed ones
              sequential: false}        true: inside a block too, weights see what the compressed ones before them give; a pass for each
skip: ["*.down_proj"]                   weights that stay as they are; "!*.experts.*" takes back what a pattern before it leaves out
overrides: [{match: "*.v_proj", weights: int8-row, quantizer: rtn}]     other formats or methods for some weights, or both
min_expert_tokens: 32                   experts that see fewer are rounded plainly and named
batch: 8                                windows that go through a block together
compute: auto                           bf16 where that is the faster one (AMX tiles), else fp32
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitpress.arithmetic import has_fast_bf16
from bitpress.calibration.stats import of_origin
from bitpress.corrections.correction import Correction
from bitpress.corrections.table import CORRECTIONS
from bitpress.errors import UsageError, fold, shown, unknown_name
from bitpress.faults import parse_yaml, read_yaml, value_fault
from bitpress.foreign import foreign_hint
from bitpress.formats import LOSSLESS, AnyFormat, find_format, read_format
from bitpress.parts import make_part, settings_of, spelled
from bitpress.quantizers.quantizer import Quantizer
from bitpress.quantizers.table import QUANTIZERS
from bitpress.transforms.basis import BasisChange
from bitpress.transforms.table import BASIS_CHANGES, SCALE_SEARCHES, TARGETS, TRANSFORMS
from bitpress.transforms.target import Target
from bitpress.transforms.transform import ScaleSearch

__all__ = [
    "DEFAULT_QUANTIZER",
    "NAMED_RECIPES",
    "Calibration",
    "NamedRecipe",
    "Override",
    "Recipe",
    "make_recipe",
    "told_overrides",
    "told_weights",
]


DEFAULT_QUANTIZER = "gptq"
DEFAULT_TRANSFORMS: tuple[Mapping[str, Any], ...] = ({"name": "awq-scale", "run_time": False},)


@dataclass(frozen=True)
class NamedRecipe:
    """A paper that is no part of a recipe but a recipe. `keys` are those that it sets."""

    summary: str
    paper: str
    source: str
    differs: str
    keys: Mapping[str, Any]


NAMED_RECIPES: dict[str, NamedRecipe] = {
    "moqe": NamedRecipe(
        summary="experts alone in few bits, rounded to nearest; everything else untouched",
        paper="P048",
        source='Kim et al. 2023, "Mixture of Quantized Experts (MoQE): Complementary Effect of Low-bit Quantization and Robustness"; '
        "only its abstract and a summary were seen: experts alone, 3 and 4 bits without training, 2 bits with it.",
        differs="3 bits with a scale for each output channel, nothing trained; other widths by --weights, for example int2-g64-zero.",
        keys={"weights": "int3-row", "quantizer": {"name": "rtn"}, "skip": ["*", "!*.experts.*"]},
    ),
}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Closed):
    text: str = "builtin"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    chat: bool = False
    inputs: Literal["pressed", "original"] = "pressed"
    sequential: bool = False


class Override(_Closed):
    """What weights have whose name matches; a part that is left out is the recipe's."""

    match: str
    weights: str | None = None
    quantizer: dict[str, Any] | None = None


class Recipe(_Closed):
    """See the head of this file.

    transforms   None stands for those of the quantizer's paper. Where the quantizer has no name either, it stands for channel scales before
                 error feedback where the network takes them, except where a weight is to stay bit for bit and with `calibration.sequential`
    quantizer    its name and settings; without a name `DEFAULT_QUANTIZER`
    """

    weights: str = "int4-g64-zero"
    transforms: tuple[dict[str, Any], ...] | None = None
    quantizer: dict[str, Any] = {}
    corrections: tuple[dict[str, Any], ...] = ()
    calibration: Calibration = Calibration()
    skip: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    min_expert_tokens: int = Field(default=32, ge=0)
    batch: int = Field(default=8, ge=1)
    compute: Literal["auto", "bf16", "fp32"] = "auto"

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a YAML file, or give one of `NAMED_RECIPES`. Raises UsageError with the key that is wrong."""
        named = NAMED_RECIPES.get(spelled(str(path), NAMED_RECIPES))
        if named is not None and not Path(path).exists():
            return make_recipe(named.keys, where=str(path))
        return make_recipe(_read_file(Path(path)), where=str(path))

    def dump(self) -> str:
        """Write the recipe as YAML that `load` reads back."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)

    def resolved(self) -> dict[str, Any]:
        """Give the recipe with every default spelled out, as it goes into a manifest."""
        values = self.model_dump(mode="json")
        values["weights"] = find_format(self.weights).name
        values["quantizer"] = {"name": self.quantizer_name, **settings_of(self.make_quantizer())}
        values["transforms"] = [{"name": name, **settings_of(part)} for name, part in self.make_transforms()]
        values["corrections"] = [{"name": name, **settings_of(part)} for name, part in self.make_corrections()]
        values["overrides"] = [_spell_out(override) for override in self.overrides]
        values["compute"] = "bf16" if self.compute_dtype() == torch.bfloat16 else "fp32"
        return values

    @property
    def quantizer_name(self) -> str:
        return str(self.quantizer.get("name", DEFAULT_QUANTIZER))

    def make_quantizer(self) -> Quantizer:
        made: Quantizer = make_part("quantizer", {**self.quantizer, "name": self.quantizer_name}, QUANTIZERS)
        return made

    def make_transforms(self) -> list[tuple[str, ScaleSearch | BasisChange | Target]]:
        return [(str(part.get("name")), make_part("transform", part, TRANSFORMS)) for part in self._transforms()]

    def make_searches(self) -> list[tuple[str, ScaleSearch]]:
        """Make those of the transforms that search channel factors."""
        return [
            (p["name"], make_part("transform", p, SCALE_SEARCHES)) for p in self._transforms() if p["name"] in SCALE_SEARCHES
        ]

    def make_changes(self) -> list[tuple[str, BasisChange]]:
        """Make those of the transforms that change the basis of single weights."""
        return [(p["name"], make_part("transform", p, BASIS_CHANGES)) for p in self._transforms() if p["name"] in BASIS_CHANGES]

    def make_targets(self) -> list[tuple[str, Target]]:
        """Make those of the transforms that change what the codes aim at."""
        return [(p["name"], make_part("transform", p, TARGETS)) for p in self._transforms() if p["name"] in TARGETS]

    def _transforms(self) -> tuple[dict[str, Any], ...]:
        if self.transforms is not None:
            return self.transforms
        if "name" not in self.quantizer and self.no_default_scales() is None:
            return tuple(dict(part) for part in DEFAULT_TRANSFORMS)
        return tuple({"name": part} if isinstance(part, str) else dict(part) for part in self.make_quantizer().transforms)

    def make_corrections(self) -> list[tuple[str, Correction]]:
        return [(str(part.get("name")), make_part("correction", part, CORRECTIONS)) for part in self.corrections]

    def format_for(self, weight: str) -> AnyFormat:
        """Give the format of a weight by its name: that of the last override that matches, else the recipe's."""
        override = self._override_for(weight)
        return find_format(self.weights if override is None or override.weights is None else override.weights)

    def quantizer_for(self, weight: str) -> tuple[str, Quantizer] | None:
        """Give the name of the quantizer that an override has for a weight, and make it; None where that is the recipe's."""
        override = self._override_for(weight)
        if override is None or override.quantizer is None:
            return None
        return str(override.quantizer.get("name")), make_part("quantizer", override.quantizer, QUANTIZERS)

    def make_quantizers(self) -> list[Quantizer]:
        """Make the recipe's quantizer and all that overrides name."""
        others = [o.quantizer for o in self.overrides if o.quantizer is not None]
        return [self.make_quantizer(), *(make_part("quantizer", other, QUANTIZERS) for other in others)]

    def _override_for(self, weight: str) -> Override | None:
        return next((o for o in reversed(self.overrides) if fnmatch.fnmatchcase(weight, o.match)), None)

    def no_default_scales(self) -> str | None:
        """Say why the channel scales that a recipe without quantizer and transforms has are left out; None where they are not."""
        if self.transforms is not None or "name" in self.quantizer:
            return None
        if exact := self.exact_formats():
            return f"{exact[0]} keeps weights bit for bit, so the default's channel scales are left out of the whole model"
        if self.calibration.sequential:
            return "calibration.sequential follows weights inside a block, so the default's channel scales are left out"
        return None

    def exact_formats(self) -> list[str]:
        """Name the formats of the recipe that keep weights bit for bit."""
        return [name for name in (self.weights, *(o.weights for o in self.overrides if o.weights)) if name in LOSSLESS]

    def needs(self) -> frozenset[str]:
        """Statistics that calibration has to collect."""
        parts: list[Any] = list(self.make_quantizers())
        parts += [part for _, part in (*self.make_transforms(), *self.make_corrections())]
        return frozenset().union(*(part.needs for part in parts))

    def compute_dtype(self) -> torch.dtype:
        if self.compute == "auto":
            return torch.bfloat16 if has_fast_bf16() else torch.float32
        return torch.bfloat16 if self.compute == "bf16" else torch.float32


def make_recipe(values: Mapping[str, Any] | None = None, sets: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Build a recipe from a mapping and `KEY=VALUE` texts with dotted keys. Raises UsageError, FormatError."""
    merged: dict[str, Any] = {key: value for key, value in (values or {}).items() if value is not None}
    for text in sets:
        _set_(merged, text)
    merged = _with_quantizer(merged)
    if isinstance(merged.get("overrides"), (list, tuple)):
        parts = [_with_quantizer(o) if isinstance(o, Mapping) else o for o in merged["overrides"]]
        merged["overrides"] = [_with_format(f"{where}: overrides", o) if isinstance(o, Mapping) else o for o in parts]
    for key, table in (("transforms", TRANSFORMS), ("corrections", CORRECTIONS)):
        if isinstance(merged.get(key), (list, tuple)):
            parts = [{"name": part} if isinstance(part, str) else part for part in merged[key]]
            merged[key] = [_with_name(part, table) for part in parts]
    merged = _with_format(where, merged)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise _usage(where, error, merged) from error
    recipe.resolved()  # builds every part, so that a wrong name or value shows here and not after an hour
    for override in recipe.overrides:
        if override.weights is None and override.quantizer is None:
            raise UsageError(f"{where}: overrides: {override.match!r} names neither weights nor a quantizer.")
        if override.weights is not None:
            find_format(override.weights)
    _check_composition(recipe)
    return recipe


def told_weights(recipe: Mapping[str, Any]) -> str:
    """Name the format of a resolved recipe, and what overrides have instead: "e8p-row; *.v_proj int4-g64 by gptq"."""
    return "; ".join([recipe["weights"], *told_overrides(recipe)])


def told_overrides(recipe: Mapping[str, Any]) -> list[str]:
    """Say what each override of a resolved recipe has: "*.v_proj int6-g64 by gptq (damp 0.05)", settings where the recipe has others."""
    told = []
    for override in recipe["overrides"]:
        parts, own = [override["match"], override.get("weights", "")], override.get("quantizer")
        if own is not None:
            usual = recipe["quantizer"] if recipe["quantizer"]["name"] == own["name"] else own
            settings = ", ".join(f"{key} {value}" for key, value in own.items() if usual[key] != value)
            parts.append(f"by {own['name']}{settings and f' ({settings})'}")
        told.append(" ".join(part for part in parts if part))
    return told


def _with_quantizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put a quantizer that is given by its name alone as its settings are given, and spell the name as the table does."""
    given = values.get("quantizer")
    if given is None:
        return dict(values)
    return {**values, "quantizer": _with_name({"name": given} if isinstance(given, str) else given, QUANTIZERS)}


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


def _spell_out(override: Override) -> dict[str, Any]:
    values = {key: value for key, value in override.model_dump(mode="json").items() if value is not None}
    if override.quantizer is not None:
        made = make_part("quantizer", override.quantizer, QUANTIZERS)
        values["quantizer"] = {"name": override.quantizer.get("name"), **settings_of(made)}
    return values


def _with_name(part: Any, table: Mapping[str, Any]) -> Any:
    named = isinstance(part, Mapping) and isinstance(part.get("name"), str)
    return {**part, "name": spelled(part["name"], table)} if named else part


def _check_composition(recipe: Recipe) -> None:
    """Raise UsageError for parts that each are fine and do not go together."""
    transforms = [name for name, _ in recipe.make_transforms()]
    exact = recipe.exact_formats()
    if exact and (transforms or recipe.corrections):
        changes = ", ".join([*transforms, *(name for name, _ in recipe.make_corrections())])
        raise UsageError(
            f"{exact[0]} keeps weights bit for bit, and {changes} would change them; "
            "use rtn or gptq without transforms and corrections."
        )
    if of_origin(recipe.needs(), "loss") and recipe.make_changes():
        changes = ", ".join(name for name, _ in recipe.make_changes())
        raise UsageError(f"the sensitivity of single weights is not known in another basis; leave out {changes}.")
    compared = sorted(of_origin(recipe.needs(), "original"))
    if compared and recipe.calibration.inputs == "original":
        raise UsageError(
            f"{compared[0]} compares the inputs of the compressed model with the original's, so calibration.inputs must be pressed."
        )
    if recipe.calibration.sequential:
        whole = [name for name in transforms if name in SCALE_SEARCHES]
        whole += sorted(of_origin(recipe.needs(), "attention"))
        if whole:
            raise UsageError(f"{whole[0]} sees a block as a whole, so calibration.sequential must be false.")
        if recipe.calibration.inputs == "original":
            raise UsageError(
                "calibration.sequential follows compressed weights inside a block, so calibration.inputs must be pressed."
            )
    late = [name for i, name in enumerate(transforms) if name in SCALE_SEARCHES and set(transforms[:i]) & set(BASIS_CHANGES)]
    if late:
        raise UsageError(f"{late[0]} scales the channels of the network, so it goes before any change of basis; put it first.")


def _usage(where: str, error: ValidationError, given: Mapping[str, Any]) -> UsageError:
    """Say what is wrong with the keys of a recipe, and what was meant."""
    at, wrong = value_fault(error)
    if error.errors()[0]["type"] != "extra_forbidden":
        return UsageError(f"{where}: {'.'.join(map(str, at))}: {wrong}")
    path = [str(part) for part in at]
    *outer, key = path
    if not outer:
        deeper = {f"calibration.{name}": name for name in Calibration.model_fields}
        part = given.get("quantizer")
        name = part.get("name") if isinstance(part, Mapping) else None
        quantizer = QUANTIZERS.get(str(name or DEFAULT_QUANTIZER))
        own = () if quantizer is None else dataclasses.fields(quantizer)
        deeper |= {f"quantizer.{field.name}": field.name for field in own}
        meant = next((long for long, name in deeper.items() if fold(name) == fold(key)), None)
        if meant is not None:
            return UsageError(f"{where}: there is no key {key!r}. Did you mean {meant!r}?")
    tables: dict[str, type[BaseModel]] = {"calibration": Calibration, "overrides": Override}
    known = (tables[outer[0]] if outer else Recipe).model_fields
    place = f"{where}: {'.'.join(path)}: " if outer else "" if where == "recipe" else f"{where}: "
    return UsageError(f"{place}{unknown_name(f'key of {outer[0]}' if outer else 'key of the recipe', key, known)}")


def _set_(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *parents, leaf = (part.strip() for part in key.split("."))
    if not equals or not all((*parents, leaf)):
        raise UsageError(f"--set {shown(text)}: write KEY=VALUE, for example quantizer.damp=0.05.")
    target = values
    for parent in parents:
        inner = target.get(parent, {})
        inner = {"name": inner} if isinstance(inner, str) else inner
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
