"""Finding out, before any work and without a weight, what a rotation does to a model, or why the model cannot be rotated."""

from collections.abc import Mapping
from typing import Any

import torch

from bitpress.errors import CheckpointError, FormatError
from bitpress.models.residual import Residual, Turn, find_residual
from bitpress.models.rotated import RotatedNetwork
from bitpress.models.skeleton import build_config
from bitpress.models.streaming import StreamedModel
from bitpress.models.value_heads import find_heads
from bitpress.transforms.rotate import Rotate

__all__ = ["find_rotated", "find_turns"]


def find_turns(config: Mapping[str, Any], where: str) -> tuple[StreamedModel, Residual | str, tuple[Turn, ...] | str]:
    """Return a model without weights, its residual stream, and the axes of its value heads; in their place the reason if there is none.

    Raises CheckpointError.
    """
    # In float32, so that conversions to it, as routers have, leave parameters what they are.
    model = StreamedModel(build_config(config), None, torch.float32, where=where)
    trace, heads = find_heads(model.model, model.task, list(model.blocks))
    return model, find_residual(trace, model.stack), heads


def find_rotated(
    config: Mapping[str, Any], aliases: Mapping[str, str], rotate: Rotate, where: str
) -> tuple[RotatedNetwork, Mapping[str, Any]]:
    """Return what a rotation does to the model of a configuration, and the configuration of the rotated model.

    `aliases` are the model's tied parameters. Raises CheckpointError, FormatError for a width that has no such rotation.
    """
    untied = _untied(config) if aliases else config
    model, residual, turns = find_turns(untied, where)
    if rotate.residual and isinstance(residual, str):
        raise CheckpointError(
            f"{where}: cannot be rotated: {residual} Leave rotate out, or rotate values alone (residual: false)."
        )
    if rotate.values and isinstance(turns, str):
        raise CheckpointError(f"{where}: value heads cannot be rotated: {turns}. Leave rotate out, or use values: false.")
    found = residual if rotate.residual and isinstance(residual, Residual) else None
    parted = {a: o for a, o in aliases.items() if found is not None and _ways(found, a) != _ways(found, o)}
    still = {a for a in parted if a in dict(model.model.all_tied_weights_keys)}
    if still or (parted and len(parted) < len(aliases)):
        name = sorted(still or aliases.keys() - parted.keys())[0]
        raise CheckpointError(
            f"{where}: cannot be rotated: {name} and {aliases[name]} are one tensor, which would have to be two. Leave rotate out."
        )
    network = RotatedNetwork(rotate, found, turns if rotate.values and not isinstance(turns, str) else (), parted)
    try:
        network.check()
    except FormatError as error:
        raise FormatError(f"{where}: rotate: {error} Use kind: orthogonal.") from error
    return network, untied if parted else config


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose head is a matrix of its own."""
    values = {**config, "tie_word_embeddings": False}
    text = values.get("text_config")
    return {**values, "text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else values


def _ways(residual: Residual, parameter: str) -> set[tuple[int, str | None]]:
    turns: tuple[Turn, ...] = residual.turns
    return {(turn.axis, turn.gain) for turn in turns if turn.parameter == parameter}
