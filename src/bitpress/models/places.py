"""Places: what a weight of a block reads, and whether it writes the residual stream, found by running the model's code (`axis_trace`)."""

from dataclasses import dataclass

from bitpress.models.axis_trace import AxisTrace
from bitpress.models.streaming import StreamedModel

__all__ = ["Place", "find_places"]


@dataclass(frozen=True)
class Place:
    """inputs: a number that weights with the same inputs have;  writes: its outputs are added to the stream between blocks, normed or not."""

    inputs: int
    writes: bool


def find_places(model: StreamedModel) -> dict[str, Place]:
    """Return the place of every parameter that values are multiplied by, by its name; those that a short text does not reach have none."""
    trace = AxisTrace(model.model, model.task, list(model.blocks))
    trace.run()
    axes = trace.known.axes
    stream = {axes.find(node) for node in trace.blocks if node is not None}
    stream |= {axes.find(gain.source) for gain in axes.gains if axes.find(gain.result) in stream}
    found: dict[str, Place] = {}
    for name, outputs in axes.written:
        inputs = next((axis for owner, axis in axes.owned if owner == name and axis != outputs), None)
        if inputs is not None:
            node = axes.find(axes.owned[name, inputs])
            found[name] = Place(node, axes.find(axes.owned[name, outputs]) in stream)
    return found
