"""Names of experts' layers, few words for many of them, and the tensors that some tools store the same layer of all experts in."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["Stacks", "experts_of", "fold_experts"]


def experts_of(layer: str) -> tuple[str, str] | None:
    """Return what the names of all layers of a block's experts begin with, and the last part of this one's; None for another layer."""
    found = re.fullmatch(r"(.+\.experts)\.[0-9]+\.([^.]+)", layer)
    return None if found is None else (found[1], found[2])


def fold_experts(layers: Collection[str], others: Collection[str]) -> tuple[list[str], list[str]]:
    """Return names and patterns that together say these layers and none of the others: one pattern for the experts of a block.

    It matches the name of all experts of the block, too, by which vLLM asks for them.
    """
    names: list[str] = []
    leaves: dict[str, set[str]] = {}
    foreign: dict[str, set[str]] = {}
    for layer in others:
        if (found := experts_of(layer)) is not None:
            foreign.setdefault(found[0], set()).add(found[1])
    for layer in sorted(layers):
        found = experts_of(layer)
        if found is None or found[1] in foreign.get(found[0], ()):
            names.append(layer)
        else:
            leaves.setdefault(found[0], set()).add(found[1])
    patterns = [
        rf"^{re.escape(block)}\.[0-9]+\.({'|'.join(map(re.escape, sorted(its)))})$"
        if block in foreign
        else rf"^{re.escape(block)}(\.|$)"
        for block, its in leaves.items()
    ]
    return names, patterns


@dataclass(frozen=True)
class Stacks:
    """How a tool names the same layer of all experts, stored in one tensor: endings of names, by those of the layers; `{e}`: the expert."""

    names: Mapping[str, str]

    def find(self, layer: str) -> tuple[str, int] | None:
        """Return the stack that a layer is stored in, and its place there; None for a layer that stands alone."""
        for ending, stack in self.names.items():
            found = re.fullmatch(rf"(.*\.){re.escape(ending)}".replace(r"\{e\}", "(0|[1-9][0-9]{0,5})"), layer)
            if found is not None:
                return f"{found[1]}{stack}", int(found[2])
        return None

    def layers(self, stack: str) -> str | None:
        """Return the name of a stack's layers, with `{e}`; None for a name of no stack."""
        for ending, name in self.names.items():
            if stack.endswith(f".{name}"):
                return f"{stack.removesuffix(name)}{ending}"
        return None
