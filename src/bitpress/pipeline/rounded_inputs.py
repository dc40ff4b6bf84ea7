"""The operands of a block's products that are rounded: their formats, with stored parameters chosen on what the compressed block makes of the text.

Dynamic parameters are those of every token and need no text. For stored ones the calibration text goes through the block once more, with its
compressed weights and with inputs as they are, and an observer looks at each input behind the maps of its weight, and at queries, keys, values and
probabilities where they are multiplied. Shifts and copies of channels are chosen on the samples that calibration drew before the block was compressed.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8

from bitpress.calibration import Stats
from bitpress.calibration.observers import Observer, Seen
from bitpress.devices import CPU
from bitpress.errors import FormatError, NumericsError
from bitpress.formats import (
    ActivationFormat,
    AttentionOperands,
    ChannelFormat,
    CompressedLayer,
    CompressedWeight,
    InputFormat,
    fake_quantize,
)
from bitpress.kernels.reference import Reference
from bitpress.models.attention import Watch, watching
from bitpress.models.products import no_product
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.rounded_attention import BlockAttention
from bitpress.recipes.inputs import InputMethod
from bitpress.recipes.method import Method
from bitpress.transforms.disassemble import Disassemble

__all__ = ["ChosenOperands", "Look", "SeenChannels", "choose_input", "choose_operands", "refused_inputs"]

# A shift of channels and how often each is there, where an input has them.
Around = tuple[torch.Tensor | None, torch.Tensor | None]
# Runs a text, and shows what it is given every input of one weight.
Look = Callable[[Callable[[torch.Tensor], None]], None]


@dataclass(frozen=True)
class ChosenOperands:
    """How the operands of a block's products are rounded.

    inputs       by the name of the weight's parameter
    attention    by the names of modules
    always_zero  the weights whose inputs were 0 on all calibration text, so that nothing chose their stored parameters
    """

    inputs: Mapping[str, InputFormat]
    attention: Mapping[str, AttentionOperands]
    always_zero: frozenset[str]


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


def choose_input(name: str, own: InputMethod, weight: CompressedWeight, look: Look | None) -> tuple[InputFormat, bool]:
    """Return how the input of a weight outside the blocks is rounded, and whether it was 0 on all calibration text.

    `look` runs the text and shows the weight's inputs; it is called where stored parameters have to be chosen.
    Raises CalibrationError, NumericsError.
    """
    so_far = own.channels(ActivationFormat(own.format, own.parameters), weight.shape[1])
    if own.observer is None:
        return so_far, False
    assert look is not None
    seen, change = _seen(own.observer.part, weight, so_far), weight.input_map
    try:
        look(seen.add if change is None else lambda x: seen.add(change.apply(x)))
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
    return own.channels(own.made(seen, name), weight.shape[1]), seen.always_zero


def choose_operands(
    stream: CalibrationStream,
    i: int,
    planned: Sequence[PlannedWeight],
    weights: Mapping[str, CompressedWeight],
    method: Method,
    channels: Mapping[str, SeenChannels],
) -> ChosenOperands:
    """Return how the inputs of a loaded block and the operands of its attention are rounded.

    weights     the compressed weights, whose decoded values are in the model if any parameters are stored
    channels    by the names of parameters, where shifts or copies of channels are wanted
    Raises CalibrationError, NumericsError, CheckpointError.
    """
    of_inputs = {p.parameter.name: p.method.inputs for p in planned if p.method.inputs is not None}
    disassemble = method.only(Disassemble)
    around = {name: _around(own, channels.get(name), weights[name], disassemble) for name, own in of_inputs.items()}
    # Stored parameters come last: the format so far says what an observer looks at.
    so_far = {
        name: own.channels(ActivationFormat(own.format, own.parameters), weights[name].shape[1], *around[name])
        for name, own in of_inputs.items()
    }
    attention = BlockAttention(stream, i, method)
    seen_inputs = {
        name: _seen(own.observer.part, weights[name], so_far[name])
        for name, own in of_inputs.items()
        if own.observer is not None
    }
    watches = attention.watches()
    if seen_inputs or watches:
        _watch(stream, i, seen_inputs, watches, weights, so_far)
    inputs = {
        name: own.channels(own.made(seen_inputs.get(name), name), weights[name].shape[1], *around[name])
        for name, own in of_inputs.items()
    }
    zero = frozenset(name for name, seen in seen_inputs.items() if seen.always_zero)
    return ChosenOperands(inputs, attention.choose(), zero)


def _around(own: InputMethod, seen: SeenChannels | None, weight: CompressedWeight, disassemble: Disassemble | None) -> Around:
    channels = _behind(seen, weight)
    copies = None if disassemble is None else _copies(disassemble, channels, own, weight)
    return (None if channels is None else channels.shift, copies)


def _seen(observer: Observer, weight: CompressedWeight, fmt: InputFormat) -> Seen:
    if observer.looks_at != "product":
        return Seen()
    behind = CompressedLayer(CompressedWeight(weight.terms, None, weight.output_map)).to(CPU)
    product, on_host = partial(Reference(keep=True).matmul, layer=behind), fmt.to(CPU)
    return Seen(product=(lambda u: product(on_host.leave(u))) if isinstance(on_host, ChannelFormat) else product)


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
    inputs: Mapping[str, Seen],
    watches: Mapping[str, Watch],
    weights: Mapping[str, CompressedWeight],
    formats: Mapping[str, InputFormat],
) -> None:
    def look(name: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        change, fmt = weights[name].input_map, formats[name]
        x = args[0] if change is None else change.apply(args[0])
        try:
            inputs[name].add(fmt.enter(x) if isinstance(fmt, ChannelFormat) else x)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error

    modules = {name: stream.model.model.get_submodule(name.rpartition(".")[0]) for name in inputs}
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in modules.items()]
    try:
        with watching(stream.model.model, watches) if watches else contextlib.nullcontext():
            stream.look_(i)
    finally:
        for hook in hooks:
            hook.remove()
