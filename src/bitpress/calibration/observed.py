"""Products with an observed weight, for any architecture.

A weight may be the parameter of a `Linear`, of GPT-2's `Conv1D`, or one slice of a 3-d tensor of experts. All of them end in one
of a few torch functions with the weight, or a view of it, as an argument; they are recognised there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Observed", "product_of"]

# function -> positions of input and weight among its arguments, and the weight's axis that meets the input
_FUNCTIONS: dict[Any, tuple[int, int, int]] = {
    torch.nn.functional.linear: (0, 1, -1),
    torch.addmm: (1, 2, -2),
    torch.mm: (0, 1, -2),
    torch.matmul: (0, 1, -2),
    torch.Tensor.matmul: (0, 1, -2),
    torch.Tensor.__matmul__: (0, 1, -2),
    torch.bmm: (0, 1, -2),
    torch.baddbmm: (1, 2, -2),
    torch.Tensor.mm: (0, 1, -2),
    torch.Tensor.bmm: (0, 1, -2),
    torch.Tensor.addmm: (1, 2, -2),
    torch.Tensor.baddbmm: (1, 2, -2),
}


@dataclass(frozen=True)
class Observed:
    """An observed weight: its name, its 2-d view in memory, whether that is [out, in] or [in, out], and whether it is an expert's."""

    name: str
    view: torch.Tensor
    out_first: bool = True
    expert: bool = False

    @property
    def in_features(self) -> int:
        return self.view.shape[1] if self.out_first else self.view.shape[0]

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as [out, in]."""
        return self.view if self.out_first else self.view.T


def product_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Return input, weight and the weight's axis that meets the input if a call is such a product, else None."""
    if func not in _FUNCTIONS:
        return None
    at_x, at_w, axis = _FUNCTIONS[func]
    x, w = _argument(args, kwargs, at_x), _argument(args, kwargs, at_w)
    return (x, w, axis) if isinstance(x, torch.Tensor) and isinstance(w, torch.Tensor) else None


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> Any:
    # torch names the operands of a product (input, weight | other | mat2); positions are what models use.
    if len(args) > position:
        return args[position]
    names = ("input",) if position == 0 else ("weight", "other", "mat2")
    return next((kwargs[n] for n in names if n in kwargs), None)
