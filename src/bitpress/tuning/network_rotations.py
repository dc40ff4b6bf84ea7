"""Rotations of the whole network, learned by what the model says: of the residual stream and of value heads, folded into all weights.

Source   Liu et al. 2024, "SpinQuant: LLM Quantization with Learned Rotations" (arXiv 2405.16406), and its public code
         (`train_utils/optimizer.py`, `10_optimize_rotation.sh`): R1 and a rotation R2 for every block's value heads, from random Hadamard
         matrices, by Cayley steps at a rate of 1.5 that falls by a cosine, 100 steps of one text on 8 devices, with inputs, keys and values
         rounded, and weights too unless GPTQ rounds them later (its README). The KL divergence over the likeliest tokens is OSTQuant's (Hu et
         al. 2025), known here from its abstract.
Differs  inputs and weights are rounded (`rounds` says which), weights to nearest in their full ranges; the operands of attention are not.
         The loss is `kl-top` unless another is asked for. A step is one window; its length is relative to the gradient (`tuning.cayley`). The
         learned rotation comes behind the recipe's own one, which is the start and is kept where nothing was
         better on held-out text.
Update   x' = R x for the residual stream, v' = R_b v for the value heads of block b; R, R_b from the identity
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import UsageError
from bitpress.tuning.leaf import Leaf
from bitpress.tuning.learned import LearnedTerm, Start, Value
from bitpress.tuning.tuner import LossName, OptimizerName, Span, Tuning

__all__ = ["Axis", "NetworkRotations", "RotatedParameter", "RotationTuning", "Rounds"]

Rounds = Literal["all", "inputs", "weights"]


@dataclass(frozen=True, kw_only=True)
class RotationTuning(Tuning):
    """`rate` is the length of a step: the largest sum of what a column's axes are turned by, in radians."""

    steps: int = 100
    batch: int = 1
    rate: float | None = 1.0
    optimizer: OptimizerName = "cayley"
    span: Span = "network"
    loss: LossName = "kl-top"
    rounds: Rounds = "all"

    summary: ClassVar[str] = "rotations of the whole network, by steps on the manifold of rotations"
    paper: ClassVar[str] = "yardstick: SpinQuant (arXiv 2405.16406)"
    rotates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds not in ("all", "inputs", "weights"):
            raise UsageError(f"rounds={self.rounds!r}: it is all, inputs or weights.")
        if self.span != "network" or self.norms:
            raise UsageError(
                f"span={self.span}, norms={self.norms:g}: rotations are learned of the whole network, and nothing beside them."
            )

    def begin(self, start: Start) -> LearnedTerm | None:
        return None


class NetworkRotations:
    """The rotations while they are learned: `residual` [n, n] or None, and by block those of value heads, all from the identity."""

    def __init__(self, width: int | None, heads: Mapping[int, int], device: torch.device) -> None:
        self.residual = None if width is None else torch.eye(width, device=device).requires_grad_()
        self.values = {block: torch.eye(row, device=device).requires_grad_() for block, row in heads.items()}

    def into(self, hidden: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        """Return the residual stream in the new basis."""
        return hidden if self.residual is None else hidden @ self.residual.T

    def back(self, hidden: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        """Return the residual stream as it was."""
        return hidden if self.residual is None else hidden @ self.residual

    def leaves(self) -> list[Leaf]:
        return [Leaf(r) for r in (self.residual, *self.values.values()) if r is not None]

    def penalty(self, progress: float) -> torch.Tensor | None:
        return None

    def value(self, progress: float) -> torch.Tensor:
        return torch.cat([leaf.tensor.flatten() for leaf in self.leaves()])

    def hard_value(self) -> torch.Tensor:
        return self.value(1.0).detach()

    def start_value(self) -> torch.Tensor:
        return self.hard_value()

    def harden(self) -> torch.Tensor:
        return self.hard_value()


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter that is turned: by the residual stream's rotation, or channels `heads` [heads, row] by that of value heads."""

    number: int
    heads: Int[torch.Tensor, "heads row"] | None = None


class RotatedParameter:
    """A parameter of block `block` in the basis that is learned; `rounded` makes of it what the block computes with."""

    def __init__(
        self,
        stored: torch.Tensor,
        axes: Sequence[Axis],
        rotations: NetworkRotations,
        block: int,
        rounded: Callable[[torch.Tensor], Value],
    ) -> None:
        self.stored, self.axes, self.rotations, self.block, self.rounded = stored, axes, rotations, block, rounded

    def turned(self) -> torch.Tensor:
        """Return the parameter in the new basis, in float32, with a gradient by the rotations."""
        work = self.stored.float()
        for axis in self.axes:
            last = work.movedim(axis.number, -1)
            if axis.heads is None:
                last = self.rotations.into(last)
            else:
                heads, turn = axis.heads.to(last.device).long(), self.rotations.values[self.block]
                last = last.index_copy(-1, heads.flatten(), (last[..., heads] @ turn.T).flatten(-2))
            work = last.movedim(-1, axis.number)
        return work

    def leaves(self) -> list[Leaf]:
        return []

    def penalty(self, progress: float) -> torch.Tensor | None:
        return None

    def value(self, progress: float) -> Value:
        return self.rounded(self.turned())

    def hard_value(self) -> Value:
        return self.value(1.0)

    def start_value(self) -> Value:
        return self.value(0.0)

    def harden(self) -> torch.Tensor:
        return self.turned().detach()
