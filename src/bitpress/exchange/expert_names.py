"""Names of experts' layers, and of the tensors that some tools store the same layer of all experts of a block in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Stacks"]


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
