"""ProbabilityOffset: what is added to rounded probabilities of attention, so that rounding moves no more weight away than it brings.

    p_hat = Q(p) + offset          for every key that the query sees; keys that are masked, or come later, keep the probability 0

    {"each": "attention"}                 one stored offset, the tensor `offset.values` of one value
    {"each": "head", "heads": "16"}       one for every head of queries
    {"each": "query"}                     nothing stored: the offset of a query is what its rounded probabilities lack to the sum of 1,
                                          divided by the number of keys that it sees

A stored offset is part of how codes are read: scale (code - zero) + offset = scale (code - (zero - offset / scale)).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float

from bitpress.errors import FormatError
from bitpress.formats.format import Expected

__all__ = ["OffsetOf", "ProbabilityOffset"]

OffsetOf = Literal["attention", "head", "query"]


@dataclass(frozen=True)
class ProbabilityOffset:
    """`values` are the stored offsets of an attention or of its heads, None for those of queries."""

    each: OffsetOf
    values: Float[torch.Tensor, " heads"] | None = None

    @property
    def name(self) -> str:
        """Words for a report: `an offset for each head`."""
        return f"an offset for each {self.each}"

    def apply(
        self, rounded: Float[torch.Tensor, "heads rows keys"], p: Float[torch.Tensor, "heads rows keys"]
    ) -> Float[torch.Tensor, "heads rows keys"]:
        """Return rounded probabilities with their offsets; `p` are they before rounding, 0 for keys that a query does not see."""
        seen = p > 0
        if self.values is not None:
            if len(self.values) not in (1, p.shape[0]):
                raise FormatError(f"probabilities of {p.shape[0]} heads of queries have offsets for {len(self.values)}.")
            return torch.where(seen, rounded + self.values.to(rounded.dtype)[:, None, None], 0.0)
        lacking = 1 - torch.where(seen, rounded, 0.0).sum(-1, keepdim=True)
        return torch.where(seen, rounded + lacking / seen.sum(-1, keepdim=True).clamp(min=1), 0.0)

    def to(self, device: torch.device) -> "ProbabilityOffset":
        """Return the offsets on another device."""
        return self if self.values is None else replace(self, values=self.values.to(device))

    def spec(self) -> dict[str, str]:
        return {
            "each": self.each,
            **({"heads": str(len(self.values))} if self.each == "head" and self.values is not None else {}),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.values is None else {"values": self.values}

    @staticmethod
    def expected(spec: Mapping[str, Any]) -> Expected:
        """Return dtype and shape of the stored offsets that a specification implies. Raises FormatError for a bad one."""
        each, heads = _read(spec)
        return {} if each == "query" else {"values": (torch.float32, (heads,))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "ProbabilityOffset":
        """Put offsets together from tensors that are the expected ones, and check them. Raises FormatError."""
        values = tensors.get("values")
        if values is not None and not bool(torch.isfinite(values).all()):
            raise FormatError("the offset of probabilities holds a NaN or an infinity.")
        return cls(_read(spec)[0], values)


def _read(spec: Mapping[str, Any]) -> tuple[OffsetOf, int]:
    """Return what has an offset of its own, and how many offsets are stored."""
    each = spec.get("each") if isinstance(spec, Mapping) else None
    if each not in get_args(OffsetOf) or set(spec) - {"each"} != ({"heads"} if each == "head" else set()):
        raise FormatError(
            f"the offset of probabilities is specified by each: one of {', '.join(get_args(OffsetOf))}, and the number of heads where each has one."
        )
    heads = spec.get("heads", "1")
    if not (isinstance(heads, str) and heads.isascii() and heads.isdigit() and int(heads[:6]) > 0 and len(heads) < 6):
        raise FormatError(f"the offset of probabilities has {heads!r} heads where a number is needed.")
    return cast(OffsetOf, each), int(heads)
