"""Reassembly: channels of an input split into equal parts, and others averaged, so that their number stays what it was.

    position i         takes
    i = into[i]        the mean of all channels c with into[c] = i; where that is channel i alone, an f-th of it
    i != into[i]       an f-th of channel copied[i], which has f such positions with its own

The columns of a weight go with it (`dual`): those of averaged channels are added up, that of a split channel is there f times. Splitting keeps the
product; averaging keeps it where the channels, or their columns, are alike. This is the one map that is no change of basis.

    >>> import torch
    >>> change = Reassembly(torch.tensor([0, 2, 2]), torch.tensor([0, 0, 2]))     # 1 goes into 2, and its place to half of 0
    >>> change.apply(torch.tensor([8.0, 1.0, 3.0])).tolist()
    [4.0, 4.0, 2.0]
    >>> change.dual().apply(torch.tensor([1.0, 5.0, 7.0])).tolist()
    [1.0, 1.0, 12.0]
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.format import Expected

__all__ = ["Reassembly"]


@dataclass(frozen=True)
class Reassembly:
    """`into` and `copied` as at the head of this file; positions that take averages have themselves in `copied`. `sums`: the map of columns."""

    into: Int[torch.Tensor, " n"]
    copied: Int[torch.Tensor, " n"]
    sums: bool = False
    kind: ClassVar[str] = "reassembly"

    @cached_property
    def freed(self) -> Bool[torch.Tensor, " n"]:
        """Whether a position takes a part of a channel that is elsewhere too."""
        return self.into.long() != torch.arange(len(self.into), device=self.into.device)

    def _divisors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parts of every channel, and the channels that every position averages; ones for a map of columns."""
        n = len(self.into)
        if self.sums:
            ones = torch.ones(n, device=self.into.device)
            return ones, ones
        parts = 1 + torch.bincount(self.copied.long()[self.freed], minlength=n)
        return parts.float(), torch.bincount(self.into.long(), minlength=n).clamp(min=1).float()

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        parts, together = self._divisors()
        shares = x / parts.to(x.dtype)
        sums = torch.zeros_like(shares).index_add(-1, self.into.long(), shares) / together.to(x.dtype)
        return torch.where(self.freed, shares[..., self.copied.long()], sums)

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        parts, together = self._divisors()
        own = (x / together.to(x.dtype))[..., self.into.long()]
        copies = torch.zeros_like(x).index_add(-1, self.copied.long(), torch.where(self.freed, x, torch.zeros_like(x)))
        return (own + copies) / parts.to(x.dtype)

    def dual(self) -> "Reassembly":
        """Return the map of a weight's columns; the other way round for that."""
        return replace(self, sums=not self.sums)

    def spec(self) -> dict[str, Any]:
        return {"sums": True} if self.sums else {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"into": self.into, "copied": self.copied}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        if spec and dict(spec) != {"sums": True}:
            raise FormatError(f"a reassembly has no settings but sums: true; got {dict(spec)}.")
        return {"into": (torch.int32, (size,)), "copied": (torch.int32, (size,))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Reassembly":
        return cls(tensors["into"], tensors["copied"], bool(spec.get("sums")))

    def check(self) -> None:
        """Raise FormatError unless every channel is in one position, and every position is taken."""
        into, copied, n = self.into.long(), self.copied.long(), len(self.into)
        for name, places in (("into", into), ("copied", copied)):
            if bool(((places < 0) | (places >= n)).any()):
                raise FormatError(f"a reassembly's {name} names a channel that is not there.")
        if not torch.equal(into[into], into):
            raise FormatError("a reassembly puts a channel where another one has been taken away.")
        if not torch.equal(copied[~self.freed], torch.arange(n, device=into.device)[~self.freed]):
            raise FormatError("a reassembly copies a channel to a position that is taken.")
        split = copied[self.freed]
        alone = torch.bincount(into, minlength=n) == 1
        if bool(self.freed[split].any()) or not bool(alone[split].all()):
            raise FormatError("a reassembly splits a channel that it averages with another.")
