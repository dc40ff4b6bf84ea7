"""Where the groups of a column method lie, and when their parameters are fitted.

    groups="static"     groups of the channels as they stand, fitted before the first column is rounded
    groups="running"    groups of the channels in the order of rounding, each fitted when its turn comes, to the weights after the feedback
                        of all groups before it

In activation order a running group holds channels of like energy. The order is then stored beside the codes as the weight's input map:
16 bits a channel, 16 / out_features bits a weight. A method arranges its weight, works in natural order, and puts its terms back.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Permutation, Term
from bitpress.quantizers.mechanisms.error_feedback import Columns, Dither, Feedback

__all__ = ["Arranged", "Groups", "arrange", "check_groups", "moves_columns"]

Groups = Literal["static", "running"]


@dataclass(frozen=True)
class Arranged:
    """A weight whose groups lie where the method wants them, with the statistics in the same order of channels.

    moved     the channels in their new order, or None if they did not move
    running   whether groups are fitted on the way
    """

    w: Float[torch.Tensor, "out in"]
    gram: Float[torch.Tensor, "in in"]
    feedback: Feedback
    moved: Int[torch.Tensor, " in"] | None
    running: bool

    def columns(
        self,
        fmt: Format,
        ratios: tuple[float, ...],
        *,
        w: Float[torch.Tensor, "out in"] | None = None,
        dither: Dither | None = None,
        lazy: int,
    ) -> Columns:
        """Round all columns, those of `w` instead of the weight's own if it is given; return the finished pass."""
        start = self.w if w is None else w
        columns = Columns(fmt, start, self.feedback.importance, ratios, static=not self.running, dither=dither)
        columns.round_(self.feedback.order, self.feedback.factor, lazy)
        return columns

    def restored(self, *terms: Term) -> CompressedWeight:
        """Return the weight of terms that stand in the new order."""
        return CompressedWeight(terms, None if self.moved is None else Permutation.of(self.moved))


def check_groups(groups: str) -> None:
    """Raise UsageError for an unknown setting."""
    if groups not in ("static", "running"):
        raise UsageError(f"groups={groups!r}: must be 'static' or 'running'.")


def moves_columns(groups: Groups, order: str) -> bool:
    """Return whether weights in groups of columns get an input map."""
    return groups == "running" and order == "activation"


def arrange(
    w: Float[torch.Tensor, "out in"],
    gram: Float[torch.Tensor, "in in"],
    feedback: Feedback,
    fmt: Format,
    groups: Groups,
    order: str,
) -> Arranged:
    """Move the columns if the groups run in another order than theirs. A row that is one group has nothing to gain and is left alone."""
    running = groups == "running" and fmt.block.cols != "all"
    if not (running and moves_columns(groups, order)):
        return Arranged(w, gram, feedback, None, running)
    moved = feedback.order
    feedback = replace(
        feedback,
        order=torch.arange(len(moved), device=moved.device),
        dead=feedback.dead[moved],
        importance=feedback.importance[moved],
    )
    return Arranged(w[:, moved].contiguous(), gram[moved][:, moved].contiguous(), feedback, moved, running)
