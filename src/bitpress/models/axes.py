"""Axes: which axes of values and parameters must be in one basis, because the network adds them up, or multiplies one by the other.

Every axis is a node. Axes that must be in one basis are joined into one; a node is pinned, with the reason, if it can be in no other
basis than its own: an activation function, a head's own view of it, a table of constants. A norm's gain leads from the node of what is
normed to a node of its own.
"""

from dataclasses import dataclass, field

__all__ = ["Axes", "Gain"]


@dataclass(frozen=True)
class Gain:
    """The values of node `source`, multiplied channel by channel by `parameter` + `offset`, plus `bias`, are those of node `result`."""

    source: int
    result: int
    parameter: str
    offset: float
    bias: str | None
    where: str


@dataclass
class Axes:
    """`summed` and `written` are axes of parameters that products sum over, and that their outputs have; `centred` says where a mean is
    subtracted, or a number added to all channels."""

    gains: list[Gain] = field(default_factory=list)
    owned: dict[tuple[str, int], int] = field(default_factory=dict)
    written: set[tuple[str, int]] = field(default_factory=set)
    _parent: list[int] = field(default_factory=list)
    _pins: dict[int, str] = field(default_factory=dict)
    _centred: dict[int, str] = field(default_factory=dict)

    def new(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def of(self, parameter: str, axis: int) -> int:
        """Return the node of a parameter's axis."""
        if (parameter, axis) not in self.owned:
            self.owned[parameter, axis] = self.new()
        return self.owned[parameter, axis]

    def find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, a: int, b: int) -> int:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[b] = a
            for notes in (self._pins, self._centred):
                if b in notes:
                    notes.setdefault(a, notes.pop(b))
        return a

    def pin(self, node: int, why: str) -> None:
        self._pins.setdefault(self.find(node), why)

    def pinned(self, node: int) -> str | None:
        return self._pins.get(self.find(node))

    def centre(self, node: int, where: str) -> None:
        self._centred.setdefault(self.find(node), where)

    def centred(self, node: int) -> bool:
        return self.find(node) in self._centred

    def parameters(self, node: int) -> list[tuple[str, int]]:
        """Return the axes of parameters that are in one basis with a node."""
        return [key for key, own in self.owned.items() if self.find(own) == self.find(node)]
