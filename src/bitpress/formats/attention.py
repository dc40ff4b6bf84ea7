"""AttentionOperands: how the queries, keys, values and probabilities of an attention are rounded before its two products.

    scores = Q_q(queries) Q_k(keys)'          queries and keys as they are multiplied, behind rotary positions
    output = Q_p(softmax(scores)) Q_v(values)

    {"queries": {"format": "int8-row", "parameters": "dynamic"}}      a scale for every token of every head
    {"keys": {"format": "int4-g32", "parameters": "dynamic"}}         a scale for every 32 channels of it
    {"values": {"format": "int8-tensor", "parameters": "static"}}     one stored scale, the tensor `values.scale`

Probabilities are rounded a query at a time, over all the keys that it sees. A probability of 0 stays 0, so that keys which are masked, or
come later, change nothing; formats whose parameters depend on how many there are cannot be theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from bitpress.errors import FormatError, unknown_name
from bitpress.formats.activation import ActivationFormat
from bitpress.formats.format import Expected, Format

__all__ = ["OPERANDS", "AttentionOperands", "check_probabilities"]


@dataclass(frozen=True)
class AttentionOperands:
    """Formats of the operands; None: as they are."""

    queries: ActivationFormat | None = None
    keys: ActivationFormat | None = None
    values: ActivationFormat | None = None
    probabilities: ActivationFormat | None = None

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
        return AttentionOperands(**{name: own.to(device) for name, own in self.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored parameters by name."""
        return {f"{name}.{leaf}": t for name, own in self.items() for leaf, t in own.tensors.items()}

    def spec(self) -> dict[str, dict[str, str]]:
        """Return the JSON fields that, with the tensors, define the operands."""
        return {name: own.spec() for name, own in self.items()}

    @staticmethod
    def expected(spec: Mapping[str, Any]) -> Expected:
        """Return dtype and shape of every tensor that a specification implies. Raises FormatError or UsageError for a bad one."""
        _check_names(spec)
        own = {name: ActivationFormat.expected(part) for name, part in spec.items()}
        return {f"{name}.{leaf}": entry for name, part in own.items() for leaf, entry in part.items()}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "AttentionOperands":
        """Put operands together from tensors that are the expected ones, and check them. Raises FormatError or UsageError."""
        _check_names(spec)
        made = {}
        for name, part in spec.items():
            own = {t.removeprefix(f"{name}."): value for t, value in tensors.items() if t.startswith(f"{name}.")}
            made[name] = ActivationFormat.build(part, own)
            made[name].check()
        return cls(**made)


OPERANDS = tuple(field.name for field in fields(AttentionOperands))


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
        if name not in OPERANDS:
            raise unknown_name("operand of an attention", name, OPERANDS)
