"""Channel factors of an input that are folded into what makes the input, while they are learned.

    norm           its weight divided by s, rounded as stored; columns of the weights times what that divided by
    norm_plus_one  the same of 1 + weight
    rows           rows of an earlier weight divided by s, before that is rounded itself

A bias is divided with the weight. Folds are found by trial (`transforms.folding`).
"""

import torch
from jaxtyping import Float

from bitpress.transforms.folding import Fold
from bitpress.tuning.learned import Leaf
from bitpress.tuning.relaxation import pass_through

__all__ = ["Folded", "FoldedVector"]


class Folded:
    """Where the factors of an input go; `stored` is the weight of the norm, None for rows of a matrix."""

    def __init__(self, fold: Fold, stored: torch.Tensor | None, device: torch.device) -> None:
        self.fold, self.stored = fold, stored
        self.channels = fold.channels
        self.channel_of = fold.channel_of.to(device)
        self.offset = 1.0 if fold.kind == "norm_plus_one" else 0.0

    def vector(self, s: Float[torch.Tensor, " channels"]) -> Float[torch.Tensor, " channels"]:
        """Return the norm's weight as it is stored, in float32, with a gradient by the factors. A channel that would be 0 stays as it was."""
        assert self.stored is not None
        shown = self.stored.float() + self.offset
        wanted = shown / s - self.offset
        kept, lost = self._rounded(s.detach())
        return pass_through(wanted, kept, ~lost)

    def columns(self, s: Float[torch.Tensor, " channels"]) -> Float[torch.Tensor, " in"]:
        """Return what undoes the division in the weights' columns: exactly what the rounded norm divides by."""
        return self._divided_by(s)[self.channel_of]

    def divide_rows(
        self, w: Float[torch.Tensor, "out in"], s: Float[torch.Tensor, " channels"]
    ) -> Float[torch.Tensor, "out in"]:
        start, stop = self.fold.rows
        return torch.cat([w[:start], w[start:stop] / s[:, None], w[stop:]])

    def bias(self, stored: torch.Tensor, s: Float[torch.Tensor, " channels"]) -> torch.Tensor:
        """Return a bias beside the weight, divided as that is and rounded as stored, in float32."""
        start, stop = self.fold.rows
        by = self._divided_by(s)
        old = stored.float()
        wanted = torch.cat([old[:start], old[start:stop] / by, old[stop:]])
        return pass_through(wanted, wanted.detach().to(stored.dtype).float())

    def _divided_by(self, s: Float[torch.Tensor, " channels"]) -> Float[torch.Tensor, " channels"]:
        if self.stored is None:
            return s
        kept, lost = self._rounded(s.detach())
        safe = torch.where(lost, 1.0, kept + self.offset)
        realised = torch.where(lost, 1.0, (self.stored.float() + self.offset) / safe)
        return pass_through(s, realised, ~lost)

    def _rounded(self, s: Float[torch.Tensor, " channels"]) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.stored is not None
        old = self.stored.float()
        new = ((old + self.offset) / s - self.offset).to(self.stored.dtype).float()
        realised = (old + self.offset) / torch.where(new + self.offset == 0, 1.0, new + self.offset)
        lost = (new + self.offset == 0) | ~torch.isfinite(realised) | (realised <= 0)
        return torch.where(lost, old, new), lost


class FoldedVector:
    """A norm's weight or a bias that takes folded factors. They are listed with the input that they belong to (`shared.factors`)."""

    def __init__(self, folded: Folded, factors: torch.Tensor, stored: torch.Tensor, *, bias: bool) -> None:
        """`factors` is the leaf of the logarithms."""
        self.folded, self.logarithms, self.stored, self.is_bias = folded, factors, stored, bias

    def leaves(self) -> list[Leaf]:
        return []

    def penalty(self, progress: float) -> None:
        return None

    def value(self, progress: float) -> torch.Tensor:
        s = self.logarithms.exp()
        return self.folded.bias(self.stored, s) if self.is_bias else self.folded.vector(s)

    @torch.no_grad()
    def hard_value(self) -> torch.Tensor:
        return self.value(1.0)

    def start_value(self) -> torch.Tensor:
        return self.stored.float()

    def harden(self) -> torch.Tensor:
        return self.hard_value().to(self.stored.dtype)
