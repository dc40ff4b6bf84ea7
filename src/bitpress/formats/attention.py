"""AttentionOperands: how the queries, keys, values and probabilities of an attention are rounded before its two products.

    scores = Q_q(T queries) Q_k(T keys)'      queries and keys as they are multiplied, behind rotary positions; T orthogonal
    output = (Q_p(softmax(scores)) + offset) Q_v(values)

    {"queries": {"format": "int8-row", "parameters": "dynamic"}}      a scale for every token of every head
    {"keys": {"format": "int4-g32", "parameters": "dynamic"}}         a scale for every 32 channels of it
    {"values": {"format": "int8-tensor", "parameters": "static"}}     one stored scale, the tensor `values.scale`
    {"rotation": {"map": "hadamard", "size": "64"}}                   T, the same for all heads; its signs are `rotation.signs`
    {"offset": {"each": "head", "heads": "16"}}                       see `formats.probability_offset`

Before rounding T changes no score, since (T q)' (T k) = q' k. Probabilities are rounded a query at a time, over all the keys that it sees. A probability of 0 stays 0, so that keys which are masked, or
come later, change nothing; formats whose parameters depend on how many there are cannot be theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, unknown_name
from bitpress.formats.activation import ActivationFormat
from bitpress.formats.format import Expected, Format
from bitpress.formats.maps.map import moved
from bitpress.formats.maps.rotations import Hadamard, core_of
from bitpress.formats.probability_offset import ProbabilityOffset

__all__ = ["OPERANDS", "AttentionOperands", "check_probabilities"]

OPERANDS = ("queries", "keys", "values", "probabilities")


@dataclass(frozen=True)
class AttentionOperands:
    """Formats of the operands; None: as they are. `rotation` mixes the channels of each head of queries and keys before they are rounded, and
    `offset` is added to rounded probabilities."""

    queries: ActivationFormat | None = None
    keys: ActivationFormat | None = None
    values: ActivationFormat | None = None
    probabilities: ActivationFormat | None = None
    rotation: Hadamard | None = None
    offset: ProbabilityOffset | None = None

    def __post_init__(self) -> None:
        if self.probabilities is not None:
            check_probabilities(self.probabilities.format)

    def items(self) -> Iterator[tuple[str, ActivationFormat]]:
        """Yield the operands that are rounded with their formats."""
        for name in OPERANDS:
            found: ActivationFormat | None = getattr(self, name)
            if found is not None:
                yield name, found

    def to(self, device: torch.device) -> "AttentionOperands":
        """Return the operands with stored parameters on a device."""
        if all(t.device == device for t in self.tensors().values()):
            return self
        rotation = None if self.rotation is None else moved(self.rotation, device)
        assert rotation is None or isinstance(rotation, Hadamard)
        offset = None if self.offset is None else self.offset.to(device)
        return AttentionOperands(**{name: own.to(device) for name, own in self.items()}, rotation=rotation, offset=offset)

    def turned(self, x: Float[torch.Tensor, "*heads row"]) -> Float[torch.Tensor, "*heads row"]:
        """Return queries or keys in the basis in which they are rounded, in their own type."""
        if self.rotation is None:
            return x
        if x.shape[-1] != self.rotation.size:
            raise FormatError(f"queries and keys have {x.shape[-1]} channels a head, and their rotation {self.rotation.size}.")
        return self.rotation.apply(x if x.dtype == torch.float64 else x.float()).to(x.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored parameters by name."""
        own = {name: dict(part.tensors) for name, part in self.items()}
        own |= {name: part.tensors() for name, part in self._beside()}
        return {f"{name}.{leaf}": t for name, part in own.items() for leaf, t in part.items()}

    def spec(self) -> dict[str, dict[str, str]]:
        """Return the JSON fields that, with the tensors, define the operands."""
        made = {name: own.spec() for name, own in self.items()}
        if self.rotation is not None:
            made["rotation"] = {"map": self.rotation.kind, "size": str(self.rotation.size)}
        return made if self.offset is None else {**made, "offset": self.offset.spec()}

    @staticmethod
    def expected(spec: Mapping[str, Any]) -> Expected:
        """Return dtype and shape of every tensor that a specification implies. Raises FormatError or UsageError for a bad one."""
        _check_names(spec)
        own = {name: _expected(name, part) for name, part in spec.items()}
        return {f"{name}.{leaf}": entry for name, part in own.items() for leaf, entry in part.items()}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "AttentionOperands":
        """Put operands together from tensors that are the expected ones, and check them. Raises FormatError or UsageError."""
        _check_names(spec)
        own = {
            name: {t.removeprefix(f"{name}."): value for t, value in tensors.items() if t.startswith(f"{name}.")}
            for name in spec
        }
        made = {name: ActivationFormat.build(part, own[name]) for name, part in spec.items() if name in OPERANDS}
        for part in made.values():
            part.check()
        rotation = offset = None
        if "rotation" in spec:
            rotation = Hadamard.build(_of_map(spec["rotation"]), own["rotation"])
            rotation.check()
        if "offset" in spec:
            offset = ProbabilityOffset.build(spec["offset"], own["offset"])
        return cls(**made, rotation=rotation, offset=offset)

    def told(self) -> list[str]:
        """Return a line for every operand that is rounded: `keys int4-row dynamic, rotated`."""
        more = {name: ", rotated" for name in ("queries", "keys") if self.rotation is not None}
        more |= {} if self.offset is None else {"probabilities": f", {self.offset.name}"}
        return [f"{name} {own.name}{more.get(name, '')}" for name, own in self.items()]

    def _beside(self) -> Iterator[tuple[str, Hadamard | ProbabilityOffset]]:
        if self.rotation is not None:
            yield "rotation", self.rotation
        if self.offset is not None:
            yield "offset", self.offset


def check_probabilities(fmt: Format) -> None:
    """Raise FormatError for a format that cannot be that of probabilities: more keys of probability 0 would change the others."""
    why = None
    if fmt.block.name not in ("row", "tensor"):
        why = "the keys of a query are as many as there are tokens; use the block row, or tensor with static parameters"
    elif fmt.grid.span > 1:
        why = "its codes hold several values; use one of a value a code"
    elif fmt.block.name == "row":
        some = torch.softmax(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), -1)
        more = fmt.fit(torch.nn.functional.pad(some, (0, 64)))
        if any(not torch.equal(value, more[name]) for name, value in fmt.fit(some).items()):
            why = "its parameters depend on how many probabilities are 0; use integers or floats"
    if why is not None:
        raise FormatError(f"probabilities {fmt.name}: {why}.")


def _check_names(spec: Mapping[str, Any]) -> None:
    for name in spec:
        if name not in (*OPERANDS, "rotation", "offset"):
            raise unknown_name("operand of an attention", name, OPERANDS)
    if "rotation" in spec and not spec.keys() & {"queries", "keys"}:
        raise FormatError("a rotation of queries and keys serves their rounding, and neither is rounded.")
    if "offset" in spec and "probabilities" not in spec:
        raise FormatError("an offset corrects rounded probabilities, and these are not rounded.")


def _expected(name: str, part: Mapping[str, Any]) -> Expected:
    if name == "rotation":
        own = _of_map(part)
        return Hadamard.expected(own, own["size"])
    return ProbabilityOffset.expected(part) if name == "offset" else ActivationFormat.expected(part)


def _of_map(part: Any) -> dict[str, int]:
    """Return the settings of the map that a specification of a rotation names. Raises FormatError."""
    size = part.get("size") if isinstance(part, Mapping) and set(part) == {"map", "size"} else None
    row = int(size) if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) < 6 else 0
    if not row or part["map"] != Hadamard.kind:
        raise FormatError("a rotation of queries and keys is specified by map: hadamard and the size of a head.")
    return {"size": row, "block": row, "core": core_of(row)}
