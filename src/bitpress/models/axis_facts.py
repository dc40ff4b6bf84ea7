"""What is known of the axes of values while a model runs: by tensor, and for views of parameters by their memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from bitpress.models.axes import Axes

__all__ = ["Fact", "Facts", "ProductSeen", "storage_of"]


@dataclass(frozen=True)
class Fact:
    """What is known of a value: the node of its last axis, and what it is of the values there.

    plain    one of them, or a sum of such       square   their squares, of which only a sum is in no basis
    zero     nothing but zeros so far            vector   a parameter of one axis, plus `offset`
    """

    node: int
    kind: Literal["plain", "square", "zero", "vector"] = "plain"
    parameter: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class ProductSeen:
    """A product with a parameter: the axes that it sums over and writes, the bias, one token's input, and the outputs."""

    parameter: str
    summed: int
    written: int
    bias: str | None
    x: torch.Tensor
    out: torch.Tensor


@dataclass
class Facts:
    """What is known while a model runs.

    shapes   of parameters, by name
    names    of parameters, by the address of their memory
    where    the module whose code runs
    heard    called with every product with a parameter
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: dict[int, str] = field(default_factory=dict)
    axes: Axes = field(default_factory=Axes)
    where: str = ""
    heard: Callable[[ProductSeen], None] = lambda product: None
    _known: Any = field(default_factory=WeakTensorKeyDictionary)

    def of(self, t: torch.Tensor) -> Fact | None:
        """Return what is known of a value; nothing is of one number, or of one for every token."""
        if t.ndim == 0 or t.shape[-1] == 1:
            return None
        found: Fact | None = self._known.get(t)
        if found is None and (axis := self.axis_of(t, -1)) is not None:
            kind: Literal["vector", "plain"] = "vector" if len(self.shapes[axis[0]]) == 1 else "plain"
            found = Fact(self.axes.of(*axis), kind, axis[0])
        return found

    def axis_of(self, t: torch.Tensor, dim: int) -> tuple[str, int] | None:
        """Return the parameter, and its axis, that an axis of a view of it is, whole."""
        name = self.names.get(storage_of(t))
        if name is None or name not in self.shapes:
            return None
        shape = self.shapes[name]
        stride = 1
        for axis in range(len(shape) - 1, -1, -1):
            if (t.stride(dim), t.shape[dim]) == (stride, shape[axis]):
                return name, axis
            stride *= shape[axis]
        return None

    def know(self, t: torch.Tensor, fact: Fact | None) -> None:
        """Set what is known of a value."""
        if fact is None or t.ndim == 0 or t.shape[-1] == 1:
            self._known.pop(t, None)
        else:
            self._known[t] = fact


def storage_of(t: torch.Tensor) -> int:
    """Return the address of a tensor's memory, the same for all of its views."""
    address: int = t.untyped_storage()._cdata
    return address
