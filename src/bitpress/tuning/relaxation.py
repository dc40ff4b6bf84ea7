"""Stand-ins for rounding that have a gradient."""

from typing import Any

import torch
from jaxtyping import Bool, Float

__all__ = ["pass_through", "rectified_sigmoid", "rectified_sigmoid_inverse", "round_through", "undecided"]

# The stretch of the rectified sigmoid beyond 0 and 1: so it reaches both with a gradient. Louizos et al. 2018, as AdaRound takes it.
STRETCH = 0.1


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        ctx.inside = inside
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] if ctx.inside is None else torch.where(ctx.inside, gradients[0], 0.0), None, None


def pass_through(
    x: Float[torch.Tensor, "*shape"], value: Float[torch.Tensor, "*shape"], inside: Bool[torch.Tensor, "*shape"] | None = None
) -> Float[torch.Tensor, "*shape"]:
    """Return `value` exactly, with the gradient of x (straight-through), and none where `inside` is false."""
    result: torch.Tensor = _Through.apply(x, value, inside)
    return result


def round_through(x: Float[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape"]:
    """Round halves to even; the gradient is 1."""
    return pass_through(x, x.detach().round())


def rectified_sigmoid(x: Float[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape"]:
    """Return clamp((1 + 2 STRETCH) sigmoid(x) - STRETCH, 0, 1): a soft bit."""
    return (torch.sigmoid(x) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def rectified_sigmoid_inverse(bit: Float[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape"]:
    """Return the x of a soft bit from 0 to 1."""
    return torch.logit((bit + STRETCH) / (1 + 2 * STRETCH))


def undecided(bit: Float[torch.Tensor, "*shape"], power: float) -> Float[torch.Tensor, ""]:
    """Return the mean of 1 - |2 bit - 1|^power: 0 where every soft bit is 0 or 1."""
    return (1 - (2 * bit - 1).abs().pow(power)).mean()
