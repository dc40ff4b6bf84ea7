"""Error feedback from group to group of columns, for methods that choose a whole group's values themselves.

What `Columns` does for the codes of a format, with the choice left to the caller: a search under the group's own metric, or with
parameters made on the way.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

__all__ = ["metric_roots", "walk"]

# From what a group should be [out, span], its place in the order and its first column, to what it becomes [out, span].
Choose = Callable[[torch.Tensor, int, int], torch.Tensor]


def walk(
    w: Float[torch.Tensor, "out in"],
    order: Int[torch.Tensor, " in"],
    factor: Float[torch.Tensor, "in in"] | None,
    span: int,
    lazy: int,
    choose: Choose,
) -> None:
    """Visit groups of `span` columns in `order`; each error goes to the groups after it through `factor`, in that order too."""
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


def metric_roots(factor: Float[torch.Tensor, "in in"] | None, size: int, span: int) -> Float[torch.Tensor, "groups span span"]:
    """Give R of every group in the order of the factor: |difference R|^2 is what its error costs once later groups made up for it."""
    if factor is None:
        return torch.eye(span).repeat(size // span, 1, 1)
    own = torch.stack([factor[i : i + span, i : i + span] for i in range(0, size, span)])
    roots: torch.Tensor = torch.linalg.inv(own)
    return roots
