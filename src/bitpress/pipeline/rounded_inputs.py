"""The inputs of a block's products: their formats, with static parameters chosen on what the compressed block makes of the text.

Dynamic parameters are those of every token and need no text. For static ones the calibration text goes through the block once more, with its
compressed weights and with inputs as they are, and an observer looks at each input behind the maps of its weight.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bitpress.calibration.observers import Seen, static_format
from bitpress.errors import BitpressError, FormatError, NumericsError
from bitpress.formats import ActivationFormat, CompressedWeight
from bitpress.models.streaming import StreamedModel, no_product
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.planned_weight import PlannedWeight

__all__ = ["choose_inputs", "refused_inputs"]


def refused_inputs(model: StreamedModel, planned: Sequence[PlannedWeight]) -> dict[str, list[str]]:
    """Return the weights whose inputs cannot be rounded as planned, by the reason."""
    wrong: dict[str, list[str]] = {}
    for p in planned:
        inputs, name = p.method.inputs, p.parameter.name
        if inputs is None:
            continue
        why = no_product(model.model.get_submodule(name.rpartition(".")[0]), name)
        if why is None:
            try:
                inputs.format.block_grid((1, p.parameter.shape[1]))
            except FormatError as error:
                why = str(error).removesuffix(".")
        if why is not None:
            wrong.setdefault(f"inputs {inputs.name}: {why}.", []).append(p.parameter.stem)
    return wrong


def choose_inputs(
    stream: CalibrationStream, i: int, planned: Sequence[PlannedWeight], weights: Mapping[str, CompressedWeight]
) -> dict[str, ActivationFormat]:
    """Return the format of the input of every weight of a loaded block that has one, by the name of the weight's parameter.

    weights   the compressed weights, whose decoded values are in the model if any parameters are static
    Raises CalibrationError, NumericsError.
    """
    rounded = {p.parameter.name: p.method.inputs for p in planned if p.method.inputs is not None}
    watched = {name: Seen() for name, inputs in rounded.items() if inputs.observer is not None}
    if watched:
        _watch(stream, i, watched, weights)
    found = {}
    for name, inputs in rounded.items():
        if inputs.observer is None:
            found[name] = ActivationFormat(inputs.format)
            continue
        try:
            found[name] = static_format(inputs.format, inputs.observer.part.choose(watched[name], inputs.format))
        except BitpressError as error:
            raise type(error)(f"{name}: {error}") from error
    return found


def _watch(stream: CalibrationStream, i: int, seen: Mapping[str, Seen], weights: Mapping[str, CompressedWeight]) -> None:
    def look(name: str, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        change = weights[name].input_map
        try:
            seen[name].add(inputs[0] if change is None else change.apply(inputs[0]))
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error

    modules = {name: stream.model.model.get_submodule(name.rpartition(".")[0]) for name in seen}
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in modules.items()]
    try:
        stream.look_(i)
    finally:
        for hook in hooks:
            hook.remove()
