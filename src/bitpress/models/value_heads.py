"""Value heads: which channels of which parameters make the values of an attention, and which read what the attention makes of them.

An attention adds values up, each head's by scores of its own: sum of a v. So H v in place of v makes H of every head's output. Heads are
found where values are the outputs of a product, channel by channel, and the attention's output is the input of a product: then the one's
rows and the other's columns take H. Values that are normed or gated on their way are in no other basis than their own. That nothing else
depends on values is seen by a second run with other values: but for what reads attentions, every product must have the input it had.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bitpress.calibration.attention import is_attention
from bitpress.models.axis_facts import ProductSeen
from bitpress.models.axis_trace import AxisTrace
from bitpress.models.residual import Turn
from bitpress.models.task import Task

__all__ = ["find_heads"]

_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)
_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
# What may be done to scores on their way from the softmax to the product with the values.
_PASSED = (
    *(torch.nn.functional.dropout, torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.type, torch.Tensor.__getitem__),
    *(torch.Tensor.contiguous, torch.Tensor.view, torch.Tensor.reshape),
)


@dataclass
class _Attention:
    """An attention: where it is, one token's output, channels of a head, and the axes of what made its values, none if not found."""

    where: str
    output: torch.Tensor
    row: int
    turns: list[Turn]
    read: bool = False


def find_heads(
    model: torch.nn.Module, task: Task, blocks: Sequence[torch.nn.Module]
) -> tuple[AxisTrace, tuple[Turn, ...] | str]:
    """Run a model, and return the trace with the axes of all its value heads, or why they cannot be rotated.

    Raises CheckpointError when the model's code cannot be run on a short input.
    """
    first = _HeadTrace(AxisTrace(model, task, blocks), {})
    says = first.run()
    turns = first.turns()
    if isinstance(turns, str):
        return first.trace, turns
    second = _HeadTrace(AxisTrace(model, task, blocks), {(t.parameter, t.axis): t for t in turns})
    same = torch.equal(says, second.run()) and len(first.inputs) == len(second.inputs)
    for (name, x), (_, other) in zip(first.inputs, second.inputs, strict=False):
        if not same or (x.shape != other.shape or not torch.equal(x, other)):
            return first.trace, f"{name}: depends on values in another way than through an attention"
    return first.trace, turns


class _HeadTrace(TorchFunctionMode):
    """Runs beside an `AxisTrace`; `moved` are axes of values, and of what reads attentions, in a run in which these have other values.

    Outputs of products, and of attentions, are random numbers no two of which are equal, so that a channel is known by its number.
    `inputs` holds what products and attentions were given, but for values and what reads attentions.
    """

    def __init__(self, trace: AxisTrace, moved: Mapping[tuple[str, int], Turn]) -> None:
        super().__init__()
        self.trace = trace
        self.inputs: list[tuple[str, torch.Tensor]] = []
        self._moved = moved
        self._products: list[ProductSeen] = []
        self._scores: list[torch.Tensor] = []
        self._attentions: list[_Attention] = []
        trace.known.heard = self._hear

    def run(self) -> torch.Tensor:
        with self:
            return self.trace.run()

    def turns(self) -> tuple[Turn, ...] | str:
        """Return the axes of all value heads, or why there are some that cannot be rotated."""
        found: dict[tuple[str, int], Turn] = {}
        for attention in self._attentions:
            if not attention.turns:
                return f"{attention.where}: its values are not the outputs of a product"
            if not attention.read:
                return f"{attention.where}: its output is not the input of a product"
            for turn in attention.turns:
                other = found.setdefault((turn.parameter, turn.axis), turn)
                if other.heads is None or turn.heads is None or not torch.equal(other.heads, turn.heads):
                    return f"{attention.where}: shares values that another attention parts in another way"
        return tuple(found.values()) if found else f"{type(self.trace.model).__name__}: no attention was found"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _SOFTMAX or (func in _PASSED and self._is_score(args[0])):
            self._scores.append(out)
        elif is_attention(func):
            query, key, value, *rest = (*args, *kwargs.values())
            self._note(query, key, *rest)
            return self._attend(value, out)
        elif func in _MATMUL and self._is_score(args[0]):
            self._note(args[0])
            return self._attend(args[1], out)
        return out

    def _is_score(self, value: Any) -> bool:
        return any(value is score for score in self._scores)

    def _note(self, *given: Any) -> None:
        where = self.trace.known.where
        self.inputs += [(where, value.clone()) for value in given if isinstance(value, torch.Tensor)]

    def _attend(self, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Note an attention, and mark its output: every channel of every head with a number of its own."""
        row = value.shape[-1]
        values = value[..., 0, :].reshape(-1, row)
        made = _Attention(self.trace.known.where, self.trace.draw(out.shape[:-2].numel() * row), row, [])
        if self._moved:
            made.output += 3.0  # beyond what is drawn
        for product in reversed(self._products):
            channels = _positions(values.flatten(), product.out.reshape(-1, product.out.shape[-1])[0])
            if channels is not None:
                own = _parted(channels.reshape(-1, row))  # a head that several share comes once
                if own is not None:
                    made.turns.append(Turn(product.parameter, product.written, None, own))
                    made.turns += [Turn(product.bias, 0, None, own)] if product.bias is not None else []
                break
        self._attentions.append(made)
        return made.output.to(out.dtype).reshape(*out.shape[:-2], 1, row).expand(out.shape).contiguous()

    def _hear(self, product: ProductSeen) -> None:
        moved = self._moved.get((product.parameter, product.written))
        if moved is not None and moved.heads is not None:
            product.out[..., moved.heads.flatten()] += 3.0
        self._products = [*self._products[-31:], product]
        reads = False
        for attention in self._attentions[-8:]:
            if attention.output.numel() == product.x.numel():
                channels = _positions(product.x, attention.output)
                if channels is not None:
                    attention.read = reads = True
                    heads = channels.argsort().reshape(-1, attention.row)
                    attention.turns += [Turn(product.parameter, product.summed, None, heads)] if attention.turns else []
        if not reads:
            self.inputs.append((product.parameter, product.x.clone()))


def _positions(wanted: torch.Tensor, among: torch.Tensor) -> torch.Tensor | None:
    """Return where each number is among others, None unless all are."""
    ordered, order = among.sort()
    at = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=len(ordered) - 1)
    return order[at] if bool((ordered[at] == wanted).all()) else None


def _parted(channels: torch.Tensor) -> torch.Tensor | None:
    """Return the channels of every head [heads, row], each head once; None if two heads share some channels only."""
    own = torch.unique(channels, dim=0)
    return own if own.unique().numel() == own.numel() else None
