"""The selective scan of transformers' Mamba with a gradient of its own, for training on a CPU.

transformers differentiates its loop over tokens step by step, and the gradient of every step fills a tensor as large as the whole text: the
time grows with the square of the length. Here the loop is one function with a loop of its own for the gradient.

    h[t] = a[t] h[t-1] + b[t]          grad b[t] = g[t] = grad h[t] + a[t+1] g[t+1],     grad a[t] = g[t] h[t-1]

Source   Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"; `mamba_selective_scan` of transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float

__all__ = ["Recurrence", "own_scan", "selective_scan"]


class Recurrence(torch.autograd.Function):
    """h[t] = a[t] h[t-1] + b[t] along the first axis, from 0; all are [time, ...]."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = b.clone()
        for t in range(1, len(h)):
            h[t].addcmul_(a[t], h[t - 1])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, h = ctx.saved_tensors
        g = gradient.clone()
        for t in range(len(h) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        by_a = torch.zeros_like(a)
        torch.mul(g[1:], h[:-1], out=by_a[1:])
        return by_a, g


def selective_scan(
    u: Float[torch.Tensor, "batch channels time"],
    dt: Float[torch.Tensor, "batch channels time"],
    A: Float[torch.Tensor, "channels states"],
    B: Float[torch.Tensor, "batch states time"],
    C: Float[torch.Tensor, "batch states time"],
    D: Float[torch.Tensor, " channels"],
    z: Float[torch.Tensor, "batch channels time"],
    delta_bias: Float[torch.Tensor, " channels"],
    delta_softplus: bool = True,
    return_last_state: bool = False,
    **_: Any,
) -> Float[torch.Tensor, "batch channels time"]:
    """Return what `mamba_selective_scan` returns where a Mamba is trained. Raises ValueError for what only a cache asks for."""
    if return_last_state or not delta_softplus:
        raise ValueError("this scan is for training: it has no cache, and its time steps pass a softplus.")
    dt = torch.nn.functional.softplus(dt + delta_bias[:, None]).permute(2, 0, 1)  # [time, batch, channels]
    moved = dt * u.permute(2, 0, 1)
    h: torch.Tensor = Recurrence.apply(torch.exp(dt[..., None] * A), moved[..., None] * B.permute(2, 0, 1)[:, :, None])
    y = (h @ C.permute(2, 0, 1)[..., None])[..., 0].permute(1, 2, 0)
    return (y + u * D[:, None]) * torch.nn.functional.silu(z)


@contextmanager
def own_scan() -> Iterator[None]:
    """Let transformers' Mamba compute its scan by `selective_scan`."""
    from transformers.models.mamba import modeling_mamba

    held = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = selective_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = held
