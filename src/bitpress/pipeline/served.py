"""What a server makes of the weights of a plan: which it multiplies with as one, and over how many devices it can divide them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitpress.checkpoints.hub_names import HubNames
from bitpress.checkpoints.parameter import stem
from bitpress.errors import UsageError
from bitpress.exchange.runtimes import RUNTIMES, ForeignRuntime
from bitpress.exchange.tensor_parallel import ServedModel, ServedWeight
from bitpress.formats import Format
from bitpress.models.linears import ROUTER, VECTOR, list_weights
from bitpress.models.places import Place, find_places
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.recipes import Method

__all__ = ["Group", "check_groups", "divide", "find_groups"]

# Names of weights that servers join, for those that a short text does not reach, whose inputs are not known.
_USUAL = (
    *(("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("query", "key", "value"), ("q", "k", "v")),
    *(("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa")),
)


@dataclass(frozen=True)
class Group:
    """Weights, in order, that a server multiplies with as one, or experts, that it reads alike; some may be kept in 16 bits."""

    names: tuple[str, ...]
    experts: bool


def find_groups(
    model: StreamedModel, method: Method, weights: Sequence[PlannedWeight], runtime: ForeignRuntime, names: HubNames
) -> list[Group]:
    """Return the groups of weights that a runtime needs in one format: those of one module with the same inputs, and experts.

    vLLM refuses a product of which only some weights are compressed, and where their formats differ takes the first for all, in silence
    (vllm/model_executor/layers/quantization/utils/quant_utils.py, is_layer_skipped; compressed_tensors/utils.py, _match_fused_layer). Of the
    experts of a block it reads one scheme (compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py, get_moe_method).
    """
    planned = {w.parameter.name: bool(w.parameter.experts) for w in weights}
    kept: dict[str, bool] = {}
    for i in range(len(model.blocks)):
        reasons = list_weights(model, i, method.recipe.skip)[1]
        kept |= {name: len(names.get(name, ())) > 1 for name, reason in reasons.items() if reason not in (ROUTER, VECTOR)}
    places = find_places(model) if runtime.joins else {}
    found: dict[tuple[bool, str, object], list[str]] = {}
    for name, experts in {**planned, **kept}.items():
        parent, _, leaf = stem(name).rpartition(".")
        if experts and runtime.experts != "apart":
            found.setdefault((True, parent if runtime.experts == "block" else "", None), []).append(name)
        elif runtime.joins and not experts:
            found.setdefault((False, parent, _inputs(name, leaf, places)), []).append(name)
    return [
        Group(tuple(map(stem, group)), experts)
        for (experts, _, _), group in found.items()
        if len(group) > 1 and not planned.keys().isdisjoint(group)
    ]


def _inputs(name: str, leaf: str, places: Mapping[str, Place]) -> object:
    """Return what those weights of a module have in common that take the same inputs."""
    if name in places:
        return places[name].inputs
    return next((usual for usual in _USUAL if leaf in usual), leaf)


def check_groups(groups: Sequence[Group], weights: Sequence[PlannedWeight], runtime: str) -> None:
    """Raise UsageError where weights of a group are not stored alike."""
    told = {w.parameter.stem: w for w in weights}

    def format_of(name: str) -> str:
        if name not in told:
            return "16 bits"
        inputs = told[name].method.inputs
        return told[name].format.name + ("" if inputs is None else f", its inputs in {inputs.name}")

    for group in groups:
        first, *others = group.names
        differing = next((name for name in others if format_of(name) != format_of(first)), None)
        if differing is not None:
            why = f"all experts of a {RUNTIMES[runtime].experts}" if group.experts else "weights that it joins into one product"
            raise UsageError(
                f"{runtime} needs one format for {why}: {first} has {format_of(first)}, and {differing} has {format_of(differing)}. "
                f"Change the recipe, or leave out --for {runtime}."
            )


def divide(
    model: StreamedModel, method: Method, weights: Sequence[PlannedWeight], runtime: ForeignRuntime, names: HubNames
) -> ServedModel:
    """Return a plan's weights as a server multiplies with them."""
    places = find_places(model)
    by_name = {w.parameter.stem: w for w in weights}
    products = [g.names for g in find_groups(model, method, weights, runtime, names) if not g.experts]
    rows = {first: sum(by_name[name].parameter.shape[0] for name in (first, *others)) for first, *others in products}
    joined = {name for _, *others in products for name in others}
    served: list[ServedWeight] = []
    for own, planned in by_name.items():
        fmt, place = planned.format, places.get(planned.parameter.name)
        if own in joined or not isinstance(fmt, Format):
            continue
        columns, group = planned.parameter.shape[1], fmt.block.cols
        served.append(
            ServedWeight(
                own,
                (rows.get(own, planned.parameter.shape[0]), columns),
                place is not None and place.writes,
                None if group == "all" else group,
                fmt.grid.code_bits if planned.method.inputs is None else None,
            )
        )
    return ServedModel(*_heads(model.model.config.get_text_config()), served)


def _heads(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of heads of queries, and of keys and values; none for a model without attention."""
    queries = _numbers(getattr(config, "num_attention_heads", None))
    keys = next(
        (n for name in ("num_key_value_heads", "num_kv_heads") if (n := _numbers(getattr(config, name, None)))), queries
    )
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        keys = (1,)
    return queries, keys


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(n for n in values if isinstance(n, int) and n > 0))
