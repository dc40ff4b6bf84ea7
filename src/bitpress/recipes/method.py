"""A recipe built once: its parts by kind, what they need, and the parts for one weight by its name.

The pipeline passes a `Method`, never the recipe. A new kind of part is one row of `kinds.KINDS`.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from bitpress.arithmetic import has_fast_bf16
from bitpress.calibration import of_origin
from bitpress.corrections.correction import Correction
from bitpress.corrections.softmax_bias import SoftmaxBias
from bitpress.devices import CPU
from bitpress.errors import UsageError
from bitpress.formats import LOSSLESS, OPERANDS, AnyFormat, Format, find_format
from bitpress.quantizers.quantizer import Quantizer, is_served
from bitpress.quantizers.rtn import RTN
from bitpress.recipes.inputs import InputMethod, input_method, operand_method
from bitpress.recipes.kinds import KINDS, LISTS
from bitpress.recipes.layer import LayerMethod, Setting, build_settings
from bitpress.recipes.named import Named, named_part, part_of_key
from bitpress.recipes.options import find_options
from bitpress.recipes.recipe import (
    AUTO_OUTER,
    DEFAULT_TRANSFORMS,
    OUTER,
    OuterWeights,
    Override,
    Recipe,
)
from bitpress.transforms.basis import BasisChange
from bitpress.transforms.rotate import Rotate
from bitpress.transforms.shift import Shift
from bitpress.transforms.transform import ScaleSearch
from bitpress.tuning.tuner import Tuning

__all__ = ["OF_OUTPUT_HEADS", "InputMethod", "LayerMethod", "Method", "Named", "build_method", "compute_dtype"]

T = TypeVar("T")
# Statistics that a head has: those of its input.
OF_OUTPUT_HEADS = frozenset({"gram", "mean_abs"})


@dataclass(frozen=True)
class BuiltOverride:
    """An override with its parts; None: the recipe's. `inputs` and `changes` are those of its weights, whoever says so."""

    said: Override
    format: AnyFormat | None
    quantizer: Named[Quantizer] | None
    inputs: InputMethod | None
    changes: tuple[Named[BasisChange], ...] | None = None


@dataclass(frozen=True)
class Method:
    """A recipe built once. `parts` are in the recipe's order; those of overrides stand beside them.

    outer    by the keys `recipe.OUTER`, what matrices outside the blocks are compressed by: a method with no more than a quantizer
    attention  how the operands of attention are rounded, by their names
    options  formats among which the recipe's budget chooses, none without one
    chosen   the format of a weight by its name, where it has been chosen
    settings what every layer chooses among during the run, by the rule that is the part of kind "choice"
    auto     those of the keys of `outer` that are "auto": left out where the model has no such matrix, or one that cannot take the format
    """

    recipe: Recipe
    parts: tuple[Named[Any], ...]
    format: AnyFormat
    overrides: tuple[BuiltOverride, ...]
    compute: torch.dtype
    inputs: InputMethod | None = None
    outer: Mapping[str, "Method"] = field(default_factory=dict)
    auto: frozenset[str] = frozenset()
    options: tuple[Format, ...] = ()
    chosen: Mapping[str, Format] = field(default_factory=dict)
    attention: Mapping[str, InputMethod] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()

    def of(self, kind: str) -> tuple[Named[Any], ...]:
        """Return the parts of one kind."""
        return tuple(named for named in self.parts if named.kind == kind)

    def of_key(self, key: str) -> tuple[Named[Any], ...]:
        """Return the parts that a key of the recipe names."""
        return tuple(named for named in self.parts if KINDS[named.kind].key == key)

    @cached_property
    def quantizer(self) -> Named[Quantizer]:
        return self.of("quantizer")[0]

    @cached_property
    def searches(self) -> tuple[ScaleSearch, ...]:
        return tuple(named.part for named in self.of("search"))

    @cached_property
    def rotate(self) -> Rotate | None:
        """Return the rotation of the whole network, which comes before everything else."""
        return next((named.part for named in self.of("network")), None)

    def only(self, row: type[T]) -> T | None:
        """Return the part that is of one row of the tables, for rows that a recipe names once at most; None without one."""
        return next((named.part for named in self.parts if isinstance(named.part, row)), None)

    @property
    def folds_shifts(self) -> bool:
        """Whether norms in front of weights take the shifts of their inputs."""
        shift = self.only(Shift)
        return shift is not None and shift.place != "online"

    @cached_property
    def changes(self) -> tuple[Named[BasisChange], ...]:
        return self.of("basis")

    @cached_property
    def corrections(self) -> tuple[Named[Correction], ...]:
        return self.of("correction")

    @cached_property
    def tunings(self) -> tuple[Named[Tuning], ...]:
        """What is learned of every block, one after the other."""
        return self.of("tuning")

    def tunings_of(self, *spans: str) -> tuple[Named[Tuning], ...]:
        """Return what is learned over some kinds of spans."""
        return tuple(named for named in self.tunings if named.part.span in spans)

    @property
    def keeps_original(self) -> bool:
        """Whether the uncompressed model's hidden states are carried beside the compressed one's."""
        by_output = any(named.part.targets == "original" for named in self.tunings_of("block", "windows"))
        return by_output or bool(of_origin(self.needs, "original"))

    @cached_property
    def every_part(self) -> tuple[Named[Any], ...]:
        """All parts, those of overrides too."""
        own = [part for o in self.overrides for part in (*(() if o.quantizer is None else [o.quantizer]), *(o.changes or ()))]
        return (*self.parts, *own)

    @property
    def every_change(self) -> list[str]:
        """Return the names of all changes of basis, those of overrides too."""
        return list(dict.fromkeys(named.name for named in self.every_part if named.kind == "basis"))

    @cached_property
    def needs(self) -> frozenset[str]:
        """Statistics that calibration has to collect."""
        parts = [named for named in self.every_part if named.kind != "tuning"]
        needs: frozenset[str] = frozenset().union(*(named.part.needs for named in parts))
        if self.tunings:  # errors are told of the layers' outputs, before and after
            needs |= {"gram"}
        return needs | {"loss_gram"} if self.recipe.calibration.gram == "loss" else needs

    @property
    def reads_text(self) -> bool:
        """Whether the calibration text is read: for statistics, or to measure what formats cost the loss."""
        return bool(self.needs or self.options or self.observes)

    @cached_property
    def observes(self) -> bool:
        """Whether static parameters of operands, or offsets of probabilities, are chosen on the calibration text."""
        offset, heads = self.only(SoftmaxBias), self.outer.values()
        by_text = any(inputs.observer is not None for inputs in self.every_input) or any(own.observes for own in heads)
        return by_text or (offset is not None and offset.observes)

    @property
    def every_input(self) -> list[InputMethod]:
        """All ways in which inputs and operands of attention are rounded, those of overrides too."""
        return [*self.product_inputs, *self.attention.values()]

    @property
    def product_inputs(self) -> list[InputMethod]:
        """All ways in which inputs of products are rounded, those of overrides and settings too."""
        every = (self.inputs, *(own.inputs for own in self.overrides), *(own.inputs for own in self.settings))
        return [inputs for inputs in every if inputs is not None]

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of some products are rounded."""
        return bool(self.every_input)

    @property
    def follows_text(self) -> bool:
        """Whether the calibration text goes through the blocks: for statistics, or to look at inputs."""
        return bool(self.needs) or self.observes

    @cached_property
    def shared_needs(self) -> frozenset[str]:
        """Statistics that every weight needs, whichever quantizer it has."""
        return frozenset().union(*(named.part.needs for named in self.parts if named.kind not in ("quantizer", "tuning")))

    @cached_property
    def _default(self) -> LayerMethod:
        return LayerMethod(
            self.format,
            self.quantizer,
            tuple(named.part for named in self.changes),
            tuple(named.part for named in self.of("target")),
            tuple(named.part for named in self.corrections),
            self.inputs,
            self.settings,
        )

    def for_layer(self, weight: str) -> LayerMethod:
        """Return the parts for a weight by its name: those of the last override that matches, else the recipe's."""
        parts = self._of_recipe(weight)
        return replace(parts, format=self.chosen[weight]) if weight in self.chosen else parts

    def _of_recipe(self, weight: str) -> LayerMethod:
        for own in reversed(self.overrides):
            if fnmatch.fnmatchcase(weight, own.said.match):
                usual = self._default
                return replace(
                    usual,
                    format=own.format or usual.format,
                    quantizer=own.quantizer or usual.quantizer,
                    inputs=own.inputs,
                    settings=usual.settings if own.said.weights is None and own.said.inputs is None else (),
                    changes=usual.changes if own.changes is None else tuple(named.part for named in own.changes),
                )
        return self._default

    def exact_formats(self) -> list[str]:
        """Return the names of the recipe's formats that keep weights bit for bit."""
        return _exact_formats(self.recipe)

    def no_default_scales(self) -> str | None:
        """Return why the channel scales of a recipe without quantizer and transforms are left out; None where they are not."""
        return _no_default_scales(self.recipe)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default spelled out, as it goes into a manifest."""
        values = self.recipe.model_dump(mode="json")
        values["weights"] = self.format.name
        values["quantizer"] = self.quantizer.settings()
        for key in LISTS:
            values[key] = [named.settings() for named in self.of_key(key)]
        values["overrides"] = [_spell_out(own) for own in self.overrides]
        for key in OUTER:
            if values[key] != "keep":
                del values[key]  # recipes of before have no such keys
        if self.inputs is None:
            del values["inputs"]  # likewise
        else:
            values["inputs"] = self.inputs.spec()
        for key in OPERANDS:
            del values[key]  # likewise
        values |= {key: own.spec() for key, own in self.attention.items()}
        if not self.tunings:
            del values["tuning"]  # likewise
        if self.recipe.budget is None:
            del values["budget"]
        else:
            values["budget"]["among"] = [fmt.name for fmt in self.options]
        if self.recipe.choose is None:
            del values["choose"]
        else:
            values["choose"] = {"by": self.of("choice")[0].settings(), "among": [own.spec() for own in self.settings]}
        values |= {key: "auto" if key in self.auto else _spell_outer(own) for key, own in self.outer.items()}
        values["compute"] = "bf16" if self.compute == torch.bfloat16 else "fp32"
        return values

    def computed_on(self, device: torch.device) -> "Method":
        """Return the method with the arithmetic that is fast on a device, where the recipe does not name one."""
        return replace(self, compute=compute_dtype(self.recipe.compute, device))


def build_method(recipe: Recipe, *, usual: bool = False) -> Method:
    """Build every part of a recipe. Raises UsageError and FormatError that say which name or setting is wrong.

    `usual`: the quantizer that the recipe names is bitpress's own choice, as in a scheme.
    """
    fmt = find_format(recipe.weights)
    quantizer: Named[Quantizer] = named_part("quantizer", {**recipe.quantizer, "name": recipe.quantizer_name})
    quantizer = replace(quantizer, usual=usual or "name" not in recipe.quantizer)
    parts: list[Named[Any]] = [part_of_key("transforms", part) for part in _transforms(recipe, quantizer.part)]
    parts += [part_of_key("corrections", part) for part in recipe.corrections]
    tunings = [part_of_key("tuning", part) for part in recipe.tuning]
    choice = [] if recipe.choose is None else [named_part("choice", recipe.choose.by)]
    inputs = None if recipe.inputs is None else input_method(recipe.inputs)
    overrides = tuple(
        BuiltOverride(
            override,
            None if override.weights is None else find_format(override.weights),
            None if override.quantizer is None else named_part("quantizer", override.quantizer),
            inputs if override.inputs is None else None if override.inputs == "keep" else input_method(override.inputs),
            None if override.transforms is None else tuple(map(_basis_change, override.transforms)),
        )
        for override in recipe.overrides
    )
    said = zip(OUTER, (recipe.embeddings, recipe.head), strict=True)
    given = {key: own for key, own in said if own is not None and own != "keep"}
    auto = frozenset(key for key, own in given.items() if own == "auto")
    if auto and _exact_formats(recipe):  # who keeps weights bit for bit keeps these too
        given, auto = {key: own for key, own in given.items() if key not in auto}, frozenset()
    outer = {
        key: _outer_method(recipe, key, OuterWeights(weights=AUTO_OUTER) if isinstance(own, str) else own, quantizer)
        for key, own in given.items()
    }
    attention = {name: operand_method(name, own) for name, own in recipe.operands.items()}
    options = () if recipe.budget is None else find_options(recipe.budget, fmt, quantizer.name, quantizer.part.serves)
    return Method(
        recipe,
        (*parts, quantizer, *tunings, *choice),
        fmt,
        overrides,
        compute_dtype(recipe.compute),
        inputs,
        outer,
        auto,
        options,
        attention=attention,
        settings=build_settings(recipe.choose),
    )


def _outer_method(recipe: Recipe, key: str, own: OuterWeights, usual: Named[Quantizer]) -> Method:
    """Build the method of a matrix outside the blocks. Without a quantizer of its own a head has the recipe's, where that takes its
    format and needs no more than statistics of its input, and a table of embeddings is rounded."""
    fmt = find_format(own.weights)
    chosen = Named[Quantizer]("quantizer", "rtn", RTN(clip="mse"))
    if key == "head" and isinstance(fmt, Format) and usual.part.needs <= OF_OUTPUT_HEADS and is_served(usual.part.serves, fmt):
        chosen = usual
    if own.quantizer is not None:
        chosen = named_part("quantizer", {"name": chosen.name, **own.quantizer})
    calibration = recipe.calibration.model_copy(update={"gram": "input", "sequential": False})
    alone = Recipe(
        weights=fmt.name,
        transforms=(),
        quantizer=chosen.settings(),
        calibration=calibration,
        compute=recipe.compute,
        inputs=own.inputs,
    )
    inputs = None if own.inputs is None else input_method(own.inputs)
    return Method(alone, (chosen,), fmt, (), compute_dtype(recipe.compute), inputs)


def compute_dtype(compute: str, device: torch.device = CPU) -> torch.dtype:
    """Return the type that blocks run in: "auto" is bf16 where that is the faster one, as on every GPU, else fp32."""
    if compute == "auto":
        return torch.bfloat16 if device.type == "cuda" or has_fast_bf16() else torch.float32
    return torch.bfloat16 if compute == "bf16" else torch.float32


def _transforms(recipe: Recipe, quantizer: Quantizer) -> list[dict[str, Any]]:
    if recipe.transforms is not None:
        return list(recipe.transforms)
    if "name" not in recipe.quantizer and _no_default_scales(recipe) is None:
        return [dict(part) for part in DEFAULT_TRANSFORMS]
    return [{"name": part} if isinstance(part, str) else dict(part) for part in quantizer.transforms]


def _basis_change(part: Mapping[str, Any]) -> Named[BasisChange]:
    """Build a transform of an override. Raises UsageError for one that changes more than a weight alone."""
    made = part_of_key("transforms", part)
    if made.kind != "basis":
        raise UsageError(f"overrides: {made.name} does not change single weights alone; put it under the recipe's transforms.")
    return made


def _spell_outer(own: Method) -> dict[str, Any]:
    values = {"weights": own.format.name, "quantizer": own.quantizer.settings()}
    return values if own.inputs is None else {**values, "inputs": own.inputs.spec()}


def _spell_out(own: BuiltOverride) -> dict[str, Any]:
    values = {key: value for key, value in own.said.model_dump(mode="json").items() if value is not None}
    if own.said.inputs is not None:
        values["inputs"] = "keep" if own.inputs is None else own.inputs.spec()
    if own.changes is not None:
        values["transforms"] = [named.settings() for named in own.changes]
    return values if own.quantizer is None else values | {"quantizer": own.quantizer.settings()}


def _exact_formats(recipe: Recipe) -> list[str]:
    return [name for name in (recipe.weights, *(o.weights for o in recipe.overrides if o.weights)) if name in LOSSLESS]


def _no_default_scales(recipe: Recipe) -> str | None:
    if recipe.transforms is not None or "name" in recipe.quantizer:
        return None
    if exact := _exact_formats(recipe):
        return f"{exact[0]} keeps weights bit for bit, so the default's channel scales are left out of the whole model"
    if recipe.calibration.sequential:
        return "calibration.sequential follows weights inside a block, so the default's channel scales are left out"
    return None
