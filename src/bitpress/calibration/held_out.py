"""A layer's inputs on tokens of windows that calibration does not count, and the classes by which errors on them are reported.

    first     the first position of a window
    massive   of the other tokens, those whose squared norm is more than `MASSIVE` times the median one
    others    the rest

A massive token may hold more of a gram than all others together, and an error measured by that gram says nothing of them. Of an expert's
inputs no position is known: a first token counts there by its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float

__all__ = ["MASSIVE", "TOKEN_CLASSES", "HeldOut", "TokenClass", "hold_out", "join_held_out"]

TokenClass = Literal["first", "massive", "others"]
TOKEN_CLASSES: tuple[TokenClass, ...] = ("first", "massive", "others")

# Ten times the median norm. In SmolLM2 the largest tokens of ordinary inputs reach 3 times, those of a down projection hundreds of times.
MASSIVE = 100.0


@dataclass(frozen=True)
class HeldOut:
    """Inputs of one layer in the model's own type; `first` marks the first positions of windows, none where positions are unknown."""

    x: Float[torch.Tensor, "tokens in"]
    first: Bool[torch.Tensor, " tokens"]

    def to(self, device: torch.device) -> "HeldOut":
        """Return the inputs on another device."""
        return HeldOut(self.x.to(device), self.first.to(device))

    def classes(self) -> dict[TokenClass, Bool[torch.Tensor, " tokens"]]:
        """Return the mask of every class."""
        energy = self.x.float().square().sum(-1)
        large = energy > MASSIVE * energy.median() if len(energy) else torch.zeros_like(self.first)
        return {"first": self.first, "massive": large & ~self.first, "others": ~(large | self.first)}


def hold_out(x: Float[torch.Tensor, "*batch in"], whole: tuple[int, int] | None) -> HeldOut:
    """Copy a batch of a layer's inputs; `whole` are windows and positions of the batch, None if only some tokens may be there."""
    rows = x.reshape(-1, x.shape[-1]).clone()
    first = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
    if whole is not None and len(rows) == whole[0] * whole[1]:
        first[:: whole[1]] = True
    return HeldOut(rows, first)


def join_held_out(parts: Sequence[HeldOut]) -> HeldOut | None:
    """Return the batches of one layer as one, None if there are none."""
    if not parts:
        return None
    return HeldOut(torch.cat([part.x for part in parts]), torch.cat([part.first for part in parts]))
