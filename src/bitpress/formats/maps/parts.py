"""The maps of weights that are stacked along the rows (experts): a map of its own for each of them.

    {"kind": "parts", "parts": 8, "map": {"kind": "scale"}}        scale float32 [8 * n], one part's after the other's

All have one specification. Such a map has no product of its own: the parts of a weight are taken apart first
(`CompressedWeight.apart`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float

from bitpress.errors import FormatError
from bitpress.formats.format import Expected
from bitpress.formats.maps.map import MAPS, Map, split_kind

__all__ = ["PartMaps"]


@dataclass(frozen=True)
class PartMaps:
    maps: tuple[Map, ...]
    kind: ClassVar[str] = "parts"

    @classmethod
    def of(cls, maps: Sequence[Map | None]) -> "Map | None":
        """Return the maps of a stack's parts as one. Raises FormatError unless all have the same specification."""
        first = maps[0]
        if len(maps) == 1 or all(change is None for change in maps):
            return first
        alike = [change for change in maps if change is not None and not isinstance(change, PartMaps)]
        if len(alike) < len(maps) or len({str((m.kind, m.spec())) for m in alike}) > 1:
            raise FormatError("only weights with maps of one kind and one specification can be stacked.")
        return cls(tuple(alike))

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        raise FormatError("a stack of weights with maps of their own has no map of all; take its parts apart first.")

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return self.apply(x)

    def dual(self) -> "PartMaps":
        return PartMaps(tuple(change.dual() for change in self.maps))

    def spec(self) -> dict[str, Any]:
        return {"parts": len(self.maps), "map": {"kind": self.maps[0].kind, **self.maps[0].spec()}}

    def tensors(self) -> dict[str, torch.Tensor]:
        each = [change.tensors() for change in self.maps]
        return {name: torch.cat([tensors[name] for tensors in each]) for name in each[0]}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        """Return dtype and shape of every tensor; `size` is that of one part's map."""
        count = spec.get("parts")
        if set(spec) != {"parts", "map"} or type(count) is not int or count < 2:
            raise FormatError(
                "maps of parts are specified by their number, 2 or more, and the map of each, no more and no less."
            )
        kind, rest = split_kind(spec["map"], "map", MAPS)
        return {n: (dtype, (dims[0] * count, *dims[1:])) for n, (dtype, dims) in MAPS[kind].expected(rest, size).items()}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        kind, rest = split_kind(spec["map"], "map", MAPS)
        each = [{name: t.chunk(spec["parts"])[i] for name, t in tensors.items()} for i in range(spec["parts"])]
        return cls(tuple(MAPS[kind].build(rest, own) for own in each))

    def check(self) -> None:
        for change in self.maps:
            change.check()
