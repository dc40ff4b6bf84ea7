"""The residual stream: which axes of which parameters are in its basis, so that it can be rotated, or why it cannot.

    x'= R x      tables and products that write the stream: their axis takes R
                 norms n(x) g: n(R x) = R n(x), so the gain g goes into the products that read it, whose axis then takes R
                 products that read the stream: their axis takes R (w R' R x = w x)

Found by running the model's code (`axis_trace`), not by names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bitpress.models.axes import Axes, Gain
from bitpress.models.axis_trace import AxisTrace

__all__ = ["Norm", "Residual", "Turn", "find_residual"]


@dataclass(frozen=True)
class Turn:
    """An axis of a parameter that takes a rotation, after it has been multiplied by the gain of the norm `gain`.

    heads   the channels that are rotated together, [heads, row]; None if all are
    """

    parameter: str
    axis: int
    gain: str | None = None
    heads: torch.Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A norm whose gain, `weight` + `offset`, becomes 1, and whose bias takes the rotation."""

    weight: str
    offset: float
    bias: str | None


@dataclass(frozen=True)
class Residual:
    """The stream's width, whether norms subtract its mean, its axes, and the norms that read it by the names of their weights."""

    width: int
    centred: bool
    turns: tuple[Turn, ...]
    norms: Mapping[str, Norm]


def find_residual(trace: AxisTrace, stack: str) -> Residual | str:
    """Return the residual stream of a model that a trace has run, or why it cannot be rotated; blocks are at `stack`."""
    axes, nodes = trace.known.axes, trace.blocks
    if not nodes or None in nodes:
        return f"{stack}: its blocks are not given one residual stream."
    stream = axes.find(nodes[0] or 0)
    if stray := next((i for i, node in enumerate(nodes) if node is not None and axes.find(node) != stream), None):
        why = next((gain for gain in axes.gains if axes.find(gain.result) == axes.find(nodes[stray] or 0)), None)
        return f"{stack}.{stray}: " + ("is given another stream." if why is None else f"{_in_stream(why)}.")
    gains = [gain for gain in axes.gains if axes.find(gain.source) == stream]
    if (reason := _refusal(axes, stream, gains)) is not None:
        return reason
    turns = [Turn(name, axis) for name, axis in axes.parameters(stream) if len(trace.known.shapes[name]) > 0]
    norms: dict[str, Norm] = {}
    for gain in gains:
        norms[gain.parameter] = Norm(gain.parameter, gain.offset, gain.bias)
        turns += [Turn(name, axis, gain.parameter) for name, axis in axes.parameters(gain.result)]
    turns = _unique(turns)
    turns += _alike(trace, turns, stack)
    if apart := next((t for t in turns if t.gain is not None and _unit(t.parameter, stack) != _unit(t.gain, stack)), None):
        return f"{apart.gain}: is a norm outside the block of {apart.parameter}, which reads it."
    width = next((trace.known.shapes[t.parameter][t.axis] for t in turns), 0)
    if not width:
        return f"{stack}: no parameter reads or writes its residual stream."
    centred = axes.centred(stream)
    return Residual(width, centred, tuple(turns), norms)


def _refusal(axes: Axes, stream: int, gains: Sequence[Gain]) -> str | None:
    """Return why a stream cannot be rotated."""
    inside = next((g for g in axes.gains if axes.find(g.result) == stream), None)
    if inside is not None:
        return f"{_in_stream(inside)}."
    if (pin := axes.pinned(stream)) is not None:
        return f"the residual stream has one basis only: {pin}."
    results: dict[int, Gain] = {}
    for gain in gains:
        other = results.setdefault(axes.find(gain.result), gain)
        if other.parameter != gain.parameter:
            return f"{gain.where}: is added up with what {other.where} gives."
        if (pin := axes.pinned(gain.result)) is not None:
            return f"{gain.where}: what it reads from the residual stream has one basis only: {pin}."
        if any(axes.find(more.source) == axes.find(gain.result) for more in axes.gains):
            return f"{gain.where}: is normed once more."
        if written := [key for key in axes.written if axes.find(axes.owned[key]) == axes.find(gain.result)]:
            return f"{gain.where}: its output is added up with that of {written[0][0]}."
        if any(g.parameter == gain.parameter and axes.find(g.source) != stream for g in axes.gains):
            return f"{gain.parameter}: is the gain of several norms."
        if (gain.parameter, 0) in axes.parameters(stream):
            return f"{gain.parameter}: is a gain and added as well."
    return None


def _in_stream(gain: Gain) -> str:
    return f"{gain.where}: its gain is for each channel of the residual stream itself, so the stream has one basis only"


def _unique(turns: Sequence[Turn]) -> list[Turn]:
    return list({(t.parameter, t.axis): t for t in turns}.values())


def _alike(trace: AxisTrace, turns: Sequence[Turn], stack: str) -> list[Turn]:
    """Return the turns of parameters that a short text does not reach, such as single experts: those of their like in the block."""
    used = {name for name, _ in trace.known.axes.owned}
    by_pattern: dict[tuple[str, str], list[Turn]] = {}
    for turn in turns:
        by_pattern.setdefault(_pattern(turn.parameter, stack), []).append(turn)
    found = []
    for name in trace.known.shapes.keys() - used:
        like = by_pattern.get(_pattern(name, stack), [])
        like = [turn for turn in like if turn.parameter == like[0].parameter]
        found += [Turn(name, turn.axis, turn.gain) for turn in like]
    return sorted(found, key=lambda turn: turn.parameter)


def _unit(name: str, stack: str) -> str:
    """Return the part of a model that is loaded together with a parameter: its block, or what is outside."""
    number = re.match(rf"{re.escape(stack)}\.\d+\.", name)
    return "" if number is None else number[0]


def _pattern(name: str, stack: str) -> tuple[str, str]:
    unit = _unit(name, stack)
    return unit, re.sub(r"\d+", "*", name.removeprefix(unit))
