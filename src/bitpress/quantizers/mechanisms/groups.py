"""Error feedback from group to group of columns, for methods that choose the values of a whole group themselves.

Like `Columns`, but the caller chooses: by a search under the group's own metric, or with parameters computed on the way.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

__all__ = ["metric_roots", "walk"]

# Maps the target of a group [out, span], its place in the order and its first column to its rounded values [out, span].
Choose = Callable[[torch.Tensor, int, int], torch.Tensor]


def walk(
    w: Float[torch.Tensor, "out in"],
    order: Int[torch.Tensor, " in"],
    factor: Float[torch.Tensor, "in in"] | None,
    span: int,
    lazy: int,
    choose: Choose,
) -> None:
    """Visit groups of `span` columns in `order`; `factor`, in the same order, feeds each error to the later groups."""
    at = order.tolist()
    lazy = -(-lazy // span) * span
    left = w.T[order].contiguous()  # [in, out]: a column is a contiguous row
    for start in range(0, len(at), lazy):
        stop = min(start + lazy, len(at))
        errors = left.new_zeros(stop - start, left.shape[1])
        for i in range(start, stop, span):
            target = left[i : i + span].T
            difference = target - choose(target, i // span, at[i])
            if factor is None:
                continue
            own = factor[i : i + span, i : i + span]
            error = torch.linalg.solve_triangular(own, difference, upper=True, left=False).T
            errors[i - start : i - start + span] = error
            left[i + span : stop].addmm_(factor[i : i + span, i + span : stop].T, error, alpha=-1)
        if factor is not None and stop < len(at):
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def metric_roots(
    factor: Float[torch.Tensor, "in in"] | None, size: int, span: int, device: torch.device
) -> Float[torch.Tensor, "groups span span"]:
    """Return R of every group in the factor's order: |difference R|^2 is the cost of its error after later groups have compensated."""
    if factor is None:
        return torch.eye(span, device=device).repeat(size // span, 1, 1)
    own = torch.stack([factor[i : i + span, i : i + span] for i in range(0, size, span)])
    roots: torch.Tensor = torch.linalg.inv(own)
    return roots
