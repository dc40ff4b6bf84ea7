"""Recipes for other runtimes: formats that they have, by bits and shapes, and whether a plan can leave for a target at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from bitpress.checkpoints.hub_names import HubNames, hub_names
from bitpress.errors import UsageError, unknown_name
from bitpress.exchange.pieces import pieces_of, refuse_pieces
from bitpress.exchange.runtimes import RUNTIMES, ForeignRuntime
from bitpress.exchange.source import Target
from bitpress.exchange.table import EXPORTERS
from bitpress.exchange.tensor_parallel import padded, sizes
from bitpress.formats import Format, parse_format
from bitpress.models.linears import list_weights
from bitpress.models.opening import open_original
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.outer_weights import PlannedOuter, plan_outer
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.served import check_groups, divide, find_groups
from bitpress.recipes import Method, build_method
from bitpress.recipes.recipe import Override
from bitpress.transforms.disassemble import Disassemble
from bitpress.transforms.shift import Shift

__all__ = ["Division", "carriers", "choose_for", "division", "find_runtime", "fit_to"]

USUAL_BITS = 4


def find_runtime(name: str) -> ForeignRuntime:
    """Return a runtime by its name. Raises UsageError."""
    if name not in RUNTIMES:
        raise unknown_name("runtime", name, RUNTIMES)
    return RUNTIMES[name]


def choose_for(
    runtime: str | None, bits: int | None, weights: str | None, outer: Mapping[str, object], *, named: bool
) -> tuple[str | None, int | None, dict[str, object]]:
    """Return weights, bits and what `embeddings` and `head` say, with a runtime's own where nothing is said.

    named   whether a recipe or a preset says what the weights are
    Raises UsageError for bits that the runtime does not have.
    """
    if runtime is None:
        return weights, bits, dict(outer)
    found = find_runtime(runtime)
    if named:
        return weights, bits, dict(outer)
    outer = {key: said or found.table for key, said in outer.items()}
    if weights is not None:
        return weights, bits, outer
    bits = USUAL_BITS if bits is None else bits
    if bits not in found.formats:
        raise UsageError(f"{runtime} has no weights of {bits} bits; it has {', '.join(map(str, sorted(found.formats)))}.")
    return found.formats[bits][0], None, outer


def fit_to(method: Method, model: Path, runtime: str | None) -> Method:
    """Return a method whose formats suit a runtime and the shapes of a model's weights; the method itself without a runtime.

    A weight whose shape the recipe's format does not suit gets the next of the runtime's formats of the same bits that does. Raises UsageError
    that names the first weight which the runtime could not load, and why.
    """
    if runtime is None:
        return method
    found = find_runtime(runtime)
    streamed, _ = open_original(model, method.compute)
    chain = next((formats for formats in found.formats.values() if method.format.name in _names(formats)), ())
    weights = _weights(streamed, method)
    target, names = _target(found.target), hub_names(streamed.model)
    by_name = {planned.parameter.stem: planned for planned in weights}
    groups = find_groups(streamed, method, weights, found, names)
    alike = {stem: group.names for group in groups for stem in group.names}
    own: list[Override] = []
    for stem, planned in by_name.items():
        together = [by_name[name] for name in alike.get(stem, (stem,)) if name in by_name]
        if planned.format != method.format or all(_refusal(p, method, target, names) is None for p in together):
            continue
        fits = [[_refusal(_in_format(p, name), method, target, names) is None for p in together] for name in chain]
        other = next((name for name, suits in zip(chain, fits, strict=True) if all(suits)), None)
        if other is not None:
            own.append(Override(match=stem, weights=parse_format(other).name))
    if own:
        recipe = method.recipe.model_copy(update={"overrides": (*own, *method.recipe.overrides)})
        method = build_method(recipe, usual=method.quantizer.usual)
        weights = _weights(streamed, method)
    if method.options:
        raise UsageError(
            f"{runtime} needs formats that are known before the run, and the recipe's budget chooses them in it; leave out budget."
        )
    if method.settings:
        raise UsageError(
            f"{runtime} needs layers that are known before the run, and the recipe's choose settles them in it; leave out choose."
        )
    if method.attention:
        raise UsageError(
            f"{runtime} cannot load the model: {_refused_attention(method)}. Leave out {', '.join(method.attention)}, or --for {runtime}."
        )
    for planned, own_method in [*((p, method) for p in weights), *_rounding_heads(plan_outer(streamed, method))]:
        why = _refusal(planned, own_method, target, names) or _not_there(planned, own_method, found)
        if why is not None:
            raise UsageError(
                f"{runtime} cannot load {planned.parameter.stem}: {why}. Change the recipe, or leave out --for {runtime}."
            )
    if found.experts == "model":
        _check_kept(streamed, method, names, runtime)
    check_groups(groups, weights, runtime)
    if found.divides and (why := sizes(divide(streamed, method, weights, found, names))[1]) is not None:
        raise UsageError(f"{runtime} cannot load {why}. Change the recipe, or leave out --for {runtime}.")
    return method


@dataclass(frozen=True)
class Division:
    """Over how many devices a runtime can divide a model: for each number why it cannot, None where it can.

    padded   the first weight that some of its versions cannot multiply with on that number of devices, which others pad
    """

    refusals: Mapping[int, str | None]
    padded: Mapping[int, str]

    def as_dict(self) -> dict[str, object]:
        return {str(devices): {"refusal": why, "padded": self.padded.get(devices)} for devices, why in self.refusals.items()}


def division(weights: Sequence[PlannedWeight], method: Method, model: StreamedModel, runtime: str | None) -> Division | None:
    """Return over how many devices a runtime can divide the weights of a plan; None without a runtime, or one that does not divide."""
    if runtime is None or not (found := find_runtime(runtime)).divides:
        return None
    served = divide(model, method, weights, found, hub_names(model.model))
    refusals = sizes(served)
    tried = {devices: padded(served, devices) for devices, why in refusals.items() if why is None}
    return Division(refusals, {devices: why for devices, why in tried.items() if why is not None})


def carriers(
    weights: Sequence[PlannedWeight], method: Method, model: StreamedModel, outer: Sequence[PlannedOuter] = ()
) -> dict[str, str | None]:
    """Return for every target why it could not hold the weights of a plan bit for bit; None where it could.

    Of the `outer` matrices those count whose inputs are rounded: others are decoded where a target cannot hold them.
    """
    every = [*((p, method) for p in weights), *_rounding_heads(outer)]
    names = hub_names(model.model)
    told: dict[str, str | None] = {}
    for name, exporter in EXPORTERS.items():
        if exporter.target is None:
            continue
        if method.attention:
            told[name] = _refused_attention(method)
            continue
        reasons = {planned.parameter.stem: _refusal(planned, own, exporter.target, names) for planned, own in every}
        first = next((f"{stem}: {why}" for stem, why in reasons.items() if why is not None), None)
        told[name] = first
    return told


def _refused_attention(method: Method) -> str:
    return f"its attention rounds {', '.join(method.attention)}, which no other tool's files say"


def _rounding_heads(outer: Sequence[PlannedOuter]) -> list[tuple[PlannedWeight, Method]]:
    """Return the heads whose inputs are rounded, which decoded weights would not do, with their methods."""
    return [(found.planned, found.method) for found in outer if found.planned.method.inputs is not None]


def _not_there(planned: PlannedWeight, method: Method, runtime: ForeignRuntime) -> str | None:
    """Say which part of a weight's plan a runtime does not have although its files could say it, or None."""
    own_formats = {name for formats in runtime.formats.values() for name in _names(formats)}
    if planned.format.name not in own_formats:
        return f"it has no {planned.format.name}; it has {', '.join(sorted(own_formats))}"
    if planned_spec(planned, method)["input_map"] is not None:
        return "its inputs are taken in another order (groups: running), which the runtime does not read"
    inputs = planned.method.inputs
    if inputs is not None and not any(fnmatchcase(planned.format.name, name) for name in runtime.inputs):
        return f"it does not round inputs ({inputs.name}) beside weights in {planned.format.name}"
    return None


def _target(name: str) -> type[Target]:
    target = EXPORTERS[name].target
    assert target is not None, f"{name} decodes every weight"
    return target


def _names(formats: tuple[str, ...]) -> set[str]:
    return {parse_format(name).name for name in formats}


def _weights(model: StreamedModel, method: Method) -> list[PlannedWeight]:
    found = [(p, i) for i in range(len(model.blocks)) for p in list_weights(model, i, method.recipe.skip)[0]]
    return [PlannedWeight(p, method.for_layer(p.stem), i) for p, i in found]


def _in_format(planned: PlannedWeight, name: str) -> PlannedWeight:
    """Return a planned weight in another format."""
    return PlannedWeight(planned.parameter, replace(planned.method, format=parse_format(name)), planned.block)


def _refusal(planned: PlannedWeight, method: Method, target: type[Target], names: HubNames) -> str | None:
    """Return why a target cannot hold a weight as it is planned."""
    fmt = planned.format
    if planned.parameter.experts and not target.experts:
        return "it is a stack of experts, which this tool does not read compressed"
    if planned.parameter.transposed and not planned.parameter.experts and not target.transposed:
        return "its module (Conv1D) holds the weight transposed, which this tool does not read compressed"
    if method.options:
        return "a budget chooses its format in the run"
    if planned.method.settings:
        return "it chooses its setting in the run"
    if isinstance(fmt, Format):
        try:
            fmt.whole_runs(planned.parameter.shape)
        except ValueError as error:  # FormatError
            return str(error).removesuffix(".")
    told = planned_spec(planned, method)
    if not planned.parameter.experts:
        inputs, apart = planned.method.inputs, {n.name: "" for n in method.of("channels") if not _folds(n.part)}
        return target.refuses(told, None if inputs is None else {**inputs.channels_spec(), **apart})
    parameter = planned.parameter
    pieces = () if parameter.transposed else pieces_of(names, parameter.name, parameter.parameter_shape)
    return refuse_pieces(told, pieces, target)


def _folds(part: Shift | Disassemble) -> bool:
    """Whether layers are plain behind a change of their input's channels."""
    return isinstance(part, Shift) and part.place == "folded"


def planned_spec(planned: PlannedWeight, method: Method) -> dict[str, object]:
    """Return what a weight's specification will be, as far as a plan can say: maps and terms by their kinds."""
    fmt, layer, shape = planned.format, planned.method, planned.parameter.shape
    terms = [{"kind": "packed", "format": fmt.name} if isinstance(fmt, Format) else {"kind": fmt.name}]
    if not layer.quantizer.part.keeps_format:
        terms = [{"kind": f"a format that {layer.quantizer.name} chooses"}]
    elif isinstance(fmt, Format) and layer.quantizer.part.stored_bytes(fmt, shape, 1) != fmt.nbytes(shape):
        terms.append({"kind": f"what {layer.quantizer.name} keeps beside them"})
    terms += [{"kind": named.name} for named in method.corrections]
    online = method.every_change + [n.name for n in method.of("search") if n.part.run_time]
    online += [named.name for named in method.tunings if named.part.adds_maps]
    if layer.quantizer.settings().get("groups") == "running":
        online = online or ["permutation"]
    elif layer.quantizer.part.keeps_map:
        online.append(layer.quantizer.name)
    kind = " and ".join(online) or None
    return {"shape": list(shape), "terms": terms, "input_map": kind and {"kind": kind}, "output_map": None}


def _check_kept(model: StreamedModel, method: Method, names: HubNames, runtime: str) -> None:
    """Raise UsageError for experts that are kept in 16 bits, by a runtime that reads all experts in one format."""
    for i in range(len(model.blocks)):
        for name in list_weights(model, i, method.recipe.skip)[1]:
            if len(names.get(name, ())) > 1:
                raise UsageError(f"{runtime} cannot load {name} in 16 bits beside compressed weights; do not skip experts.")
