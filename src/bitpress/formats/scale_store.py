"""The protocol of scale stores, and the stored scales that a fit tries for the scale that it wants.

The nearest scale of a coarse store may clip a block, up to 29% of its range under powers of two, which costs more than all other
rounding once codes have a few bits. `Format.fit` therefore tries the scales beside it too and keeps the one with the least squared error.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float

__all__ = ["Outer", "ScaleStore", "Shapes", "first_trials", "shared_name"]

Outer = Mapping[str, torch.Tensor]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class ScaleStore(Protocol):
    """Rounds scales `[down, across]` and stores them. The tensor named "" holds the scales; the others hold shared values."""

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        """Choose the shared values so that all these scales fit; every value broadcasts against them."""
        ...

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        """Return the nearest scales that can be stored. Raises NumericsError if one is out of range."""
        ...

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the stored scales below and above the nearest one; None where rounding changes a scale too little to matter."""
        ...

    @property
    def fine_bits(self) -> int:
        """Codes of up to so many bits a weight are clipped by less than half a step if their scale is rounded to the nearest."""
        ...

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        """Return the tensors of a file; `scale` is rounded already."""
        ...

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        """Return the scales in float32."""
        ...

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        """Return the shared values of a file, as `outer` returns them: scales that were stored are rounded to themselves by these."""
        ...

    def expected(self, down: int, across: int) -> Shapes:
        """Return dtype and shape of every tensor of a file."""
        ...

    def shared_by_rows(self) -> bool:
        """Return whether scales of different rows share values, so that rows cannot be separated."""
        ...

    @property
    def coarseness(self) -> float:
        """The relative change of a scale by rounding inside the store's range; a larger change means that it is out of range (`reach`)."""
        ...


def first_trials(store: ScaleStore, scale: torch.Tensor, outer: Outer, bits: float, searched: bool) -> list[torch.Tensor]:
    """Return the stored scales to try for the scale of a block's full range, the nearest first; often it alone.

    If scales are searched, those are the two beside it. If not, it is the one on the other side of `scale`, and none where the scale
    is stored exactly (OCP's powers of two) or codes of `bits` bits a weight cannot tell the difference.
    """
    nearest = store.round(scale, outer)
    beside = store.beside(scale, outer) if searched or bits > store.fine_bits else None
    if beside is None:
        return [nearest]
    below, above = beside
    if searched:
        return [nearest, below, above]
    other = torch.where(nearest < scale, above, torch.where(nearest > scale, below, nearest))
    return [nearest] if torch.equal(other, nearest) else [nearest, other]


def shared_name(param: str, part: str) -> str:
    """Return the name of a stored tensor of a parameter: its own, or a part that many values share."""
    return f"{param}_{part}" if part else param
