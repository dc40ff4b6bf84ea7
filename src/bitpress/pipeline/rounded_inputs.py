"""The inputs of a block's products: their formats, with static parameters chosen on what the compressed block makes of the text.

Dynamic parameters are those of every token and need no text. For static ones the calibration text goes through the block once more, with its
compressed weights and with inputs as they are, and an observer looks at each input behind the maps of its weight. Shifts and copies of channels
are chosen on the samples that calibration drew before the block was compressed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8

from bitpress.calibration import Stats
from bitpress.calibration.observers import Seen, static_format
from bitpress.errors import BitpressError, FormatError, NumericsError
from bitpress.formats import ActivationFormat, ChannelFormat, CompressedWeight, InputFormat, fake_quantize
from bitpress.models.streaming import StreamedModel, no_product
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.recipes.input_method import InputMethod
from bitpress.transforms.disassemble import Disassemble

__all__ = ["SeenChannels", "choose_inputs", "refused_inputs"]


@dataclass(frozen=True)
class SeenChannels:
    """What calibration saw of the channels of one weight's input, as they are before the weight's maps.

    sample   inputs of some tokens
    shift    the middle of every channel, where inputs are shifted
    online   the factors by which the weight's maps divide, where no layer in front does
    """

    sample: Float[torch.Tensor, "tokens in"]
    shift: Float[torch.Tensor, " in"] | None = None
    online: Float[torch.Tensor, " in"] | None = None

    @classmethod
    def of(
        cls, stats: Stats, shift: Float[torch.Tensor, " in"] | None, factor: Float[torch.Tensor, " in"] | None, *, folded: bool
    ) -> "SeenChannels | None":
        """Return what is known of an input whose channels are divided by a factor, in front of the layer if it is `folded`."""
        if stats.sample is None:
            return None
        if factor is None or not folded:
            return cls(stats.sample, shift, factor)
        return cls(stats.sample / factor, None if shift is None else shift / factor)


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
                width = p.parameter.shape[1]
                if inputs.first is None:
                    inputs.format.block_grid((1, width))
                else:
                    made = inputs.channels(ActivationFormat(inputs.format, inputs.parameters), width)
                    assert isinstance(made, ChannelFormat)
                    made.fits(width)
            except FormatError as error:
                why = str(error).removesuffix(".")
        if why is not None:
            wrong.setdefault(f"inputs {inputs.name}: {why}.", []).append(p.parameter.stem)
    return wrong


def choose_inputs(
    stream: CalibrationStream,
    i: int,
    planned: Sequence[PlannedWeight],
    weights: Mapping[str, CompressedWeight],
    seen: Mapping[str, SeenChannels],
    disassemble: Disassemble | None,
) -> dict[str, InputFormat]:
    """Return the format of the input of every weight of a loaded block that has one, by the name of the weight's parameter.

    weights   the compressed weights, whose decoded values are in the model if any parameters are static
    seen      by the same names, where shifts or copies of channels are wanted
    Raises CalibrationError, NumericsError.
    """
    rounded = {p.parameter.name: p.method.inputs for p in planned if p.method.inputs is not None}
    # Parameters of the rest come last: the format so far says what an observer looks at.
    found = {}
    for name, inputs in rounded.items():
        channels = _behind(seen.get(name), weights[name])
        copies = None if disassemble is None else _copies(disassemble, channels, inputs, weights[name])
        around = (None if channels is None else channels.shift, copies)
        found[name] = inputs.channels(ActivationFormat(inputs.format, inputs.parameters), weights[name].shape[1], *around)
    watched = {name: Seen() for name, inputs in rounded.items() if inputs.observer is not None}
    if watched:
        _watch(stream, i, watched, weights, found)
    for name, inputs in rounded.items():
        if inputs.observer is None:
            continue
        try:
            rest = static_format(inputs.format, inputs.observer.part.choose(watched[name], inputs.format))
        except BitpressError as error:
            raise type(error)(f"{name}: {error}") from error
        before = found[name]
        around = (before.shift, before.copies) if isinstance(before, ChannelFormat) else (None, None)
        found[name] = inputs.channels(rest, weights[name].shape[1], *around)
    return found


def _behind(seen: SeenChannels | None, weight: CompressedWeight) -> SeenChannels | None:
    """Return what was seen of channels, as it is behind the maps of a weight."""
    change = weight.input_map
    if seen is None or change is None:
        return seen
    return SeenChannels(change.apply(seen.sample), None if seen.shift is None else change.apply(seen.shift))


def _copies(
    disassemble: Disassemble, seen: SeenChannels | None, inputs: InputMethod, weight: CompressedWeight
) -> UInt8[torch.Tensor, " in"]:
    terms = [term.dequantize() for term in weight.terms]
    sample = None if seen is None else seen.sample if seen.shift is None else seen.sample - seen.shift

    def round_(x: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        if inputs.parameters == "dynamic":
            return inputs.channels(ActivationFormat(inputs.format), x.shape[1], None, copies).round(x)
        apart: torch.Tensor = fake_quantize(x / copies, inputs.format)
        return apart * copies

    return disassemble.plan(sample, torch.stack(terms).sum(0), round_)


def _watch(
    stream: CalibrationStream,
    i: int,
    seen: Mapping[str, Seen],
    weights: Mapping[str, CompressedWeight],
    formats: Mapping[str, InputFormat],
) -> None:
    def look(name: str, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        change, fmt = weights[name].input_map, formats[name]
        x = inputs[0] if change is None else change.apply(inputs[0])
        try:
            seen[name].add(fmt.enter(x) if isinstance(fmt, ChannelFormat) else x)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error

    modules = {name: stream.model.model.get_submodule(name.rpartition(".")[0]) for name in seen}
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in modules.items()]
    try:
        stream.look_(i)
    finally:
        for hook in hooks:
            hook.remove()
