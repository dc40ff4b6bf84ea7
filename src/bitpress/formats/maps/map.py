"""Maps: the linear changes of basis before and after the terms of a compressed weight.

    y = T_out (sum of terms) T_in x

A map acts on the last dimension. The `i`-th value after `Scale` is `scale[i] * x[i]`, after `Permutation` it is `x[order[i]]`.
`Hadamard` and `Kronecker` are in `formats.maps.rotations`, `Affine` in `formats.maps.affine`, `Reassembly`, the one map that cannot be undone,
in `formats.maps.reassembly`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError, unknown_name
from bitpress.formats.format import Expected
from bitpress.formats.maps.affine import Affine
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.formats.maps.rotations import Hadamard, Kronecker

__all__ = ["MAPS", "Chain", "Map", "Permutation", "Scale", "chain", "moved", "split_kind"]


class Map(Protocol):
    kind: ClassVar[str]

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        """Return T x."""
        ...

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        """Return T' x; the rows of `w T` are T' times the rows of `w`."""
        ...

    def dual(self) -> "Map":
        """Return the map T^-T for the rows of a weight whose inputs are mapped by T; T itself for a rotation. A reassembly has no inverse, and
        returns the map of columns that goes with it."""
        ...

    def spec(self) -> dict[str, Any]: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...

    def check(self) -> None:
        """Raise FormatError if the stored content is invalid for this kind of map."""
        ...


def _no_settings(spec: Mapping[str, Any]) -> None:
    if spec:
        raise FormatError(f"this kind of map has no settings, but the file has {sorted(spec)}.")


@dataclass(frozen=True)
class Scale:
    """Multiply every channel by its own factor."""

    scale: Float[torch.Tensor, " n"]
    kind: ClassVar[str] = "scale"

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return x * self.scale.to(x.dtype)

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return self.apply(x)

    def dual(self) -> "Scale":
        return Scale(1 / self.scale)

    def spec(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        _no_settings(spec)
        return {"scale": (torch.float32, (size,))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Scale":
        return cls(tensors["scale"])

    def check(self) -> None:
        if not bool(torch.isfinite(self.scale).all()):
            raise FormatError("a scale map holds a NaN or an infinity.")


# The largest width whose channels have numbers of 16 bits.
NARROW = 1 << 16


@dataclass(frozen=True)
class Permutation:
    """Move channel `order[i]` to position `i`. Use `of` to make one: it stores numbers of 16 bits where they suffice.

    A specification without `bits` means int32, as all had before there was a choice.
    """

    order: Int[torch.Tensor, " n"]
    kind: ClassVar[str] = "permutation"

    @classmethod
    def of(cls, order: Int[torch.Tensor, " n"]) -> "Permutation":
        """Return the permutation of an order of channels."""
        return cls(order.to(torch.uint16 if order.numel() <= NARROW else torch.int32).contiguous())

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return x[..., self.order.long()]

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return x[..., torch.argsort(self.order.long())]

    def dual(self) -> "Permutation":
        return self

    def spec(self) -> dict[str, Any]:
        return {"bits": 16} if self.order.dtype == torch.uint16 else {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"order": self.order}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        if not spec:
            return {"order": (torch.int32, (size,))}
        if set(spec) != {"bits"} or type(spec["bits"]) is not int or spec["bits"] != 16 or size > NARROW:
            raise FormatError(
                f"a permutation of {size} channels has no settings but bits: 16, for at most {NARROW}; got {dict(spec)}."
            )
        return {"order": (torch.uint16, (size,))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Permutation":
        return cls(tensors["order"])

    def check(self) -> None:
        # The order is used as an address: anything but every channel exactly once is refused before a gather reads it.
        order = self.order.long()
        if not torch.equal(torch.sort(order).values, torch.arange(order.numel(), device=order.device)):
            raise FormatError("a permutation map does not hold every channel exactly once.")


@dataclass(frozen=True)
class Chain:
    """Apply several maps, the first one first."""

    maps: tuple[Map, ...]
    kind: ClassVar[str] = "chain"

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        for change in self.maps:
            x = change.apply(x)
        return x

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        for change in reversed(self.maps):
            x = change.apply_transposed(x)
        return x

    def dual(self) -> "Chain":
        return Chain(tuple(change.dual() for change in self.maps))

    def spec(self) -> dict[str, Any]:
        return {"maps": [{"kind": change.kind, **change.spec()} for change in self.maps]}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": t for i, change in enumerate(self.maps) for name, t in change.tensors().items()}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        parts = spec.get("maps")
        if set(spec) != {"maps"} or not isinstance(parts, list) or not 2 <= len(parts) <= 8:
            raise FormatError("a chain is specified by its 2 to 8 maps, no more and no less.")
        tensors: Expected = {}
        for i, part in enumerate(parts):
            if isinstance(part, Mapping) and part.get("kind") == "chain":
                raise FormatError("a chain must not contain another chain.")
            kind, rest = split_kind(part, "map", MAPS)
            tensors |= {f"{i}.{name}": t for name, t in MAPS[kind].expected(rest, size).items()}
        return tensors

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Chain":
        maps = []
        for i, part in enumerate(spec["maps"]):
            kind, rest = split_kind(part, "map", MAPS)
            own = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            maps.append(MAPS[kind].build(rest, own))
        return cls(tuple(maps))

    def check(self) -> None:
        for change in self.maps:
            change.check()


MAPS: dict[
    str, type[Scale] | type[Permutation] | type[Chain] | type[Hadamard] | type[Kronecker] | type[Affine] | type[Reassembly]
] = {
    "scale": Scale,
    "permutation": Permutation,
    "chain": Chain,
    "hadamard": Hadamard,
    "kronecker": Kronecker,
    "reassembly": Reassembly,
    "affine": Affine,
}


def chain(*maps: Map | None) -> Map | None:
    """Return the composition of maps, the first one applied first; None is the identity."""
    parts: list[Map] = []
    for change in maps:
        parts += change.maps if isinstance(change, Chain) else [] if change is None else [change]
    return None if not parts else parts[0] if len(parts) == 1 else Chain(tuple(parts))


def moved(change: Map, device: torch.device) -> Map:
    """Return a map on another device."""
    return MAPS[change.kind].build(change.spec(), {name: t.to(device) for name, t in change.tensors().items()})


def split_kind(entry: Any, noun: str, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split a specification into its kind, which must be in `table`, and the rest."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("kind"), str):
        raise FormatError(f"a {noun} needs a kind.")
    kind = entry["kind"]
    if kind not in table:
        raise unknown_name(noun, kind, table)
    return kind, {k: v for k, v in entry.items() if k != "kind"}
