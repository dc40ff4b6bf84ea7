"""Orthogonal matrices that are learned: by a parametrisation, or by steps that stay on the manifold.

    Cayley's map      R = (I - S)^-1 (I + S),  S = A - A'        any matrix A; A = 0 is the identity
    a step            X <- (I + a/2 W)^-1 (I - a/2 W) X,  W = M X' - X M',  M = momentum M + gradient

Source   Li et al. 2020, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform" (arXiv 2002.01113), as SpinQuant's
         public code takes it (`train_utils/optimizer.py`).
Differs  the inverse is solved for in float64, where the authors iterate five times; the length a is the rate divided by the largest sum of a
         column of |W|, where theirs is the smaller one of the rate and the inverse of that sum; the momentum is not projected again.
"""

import torch
from jaxtyping import Float

from bitpress.formats import Kronecker, Map
from bitpress.formats.maps.rotations import LARGEST, most_equal_order

__all__ = ["CayleySGD", "cayley", "orders_of", "rotation"]

MOMENTUM = 0.9


def cayley(a: Float[torch.Tensor, "n n"]) -> Float[torch.Tensor, "n n"]:
    """Return the rotation of a matrix by Cayley's map, float32."""
    skew = a.double() - a.double().T
    eye = torch.eye(len(a), dtype=torch.float64, device=a.device)
    turned: torch.Tensor = torch.linalg.solve(eye - skew, eye + skew)
    return turned.float().contiguous()  # solved column by column: products of another layout are rounded otherwise


def orders_of(width: int, *, whole: bool) -> tuple[int, int] | None:
    """Return the orders of the two factors of a matrix: 1 and the width where it may be whole, else the most equal ones; None where a factor
    would be larger than a map stores."""
    a = 1 if whole and width <= LARGEST else most_equal_order(width)
    return None if width // a > LARGEST else (a, width // a)


def rotation(left: Float[torch.Tensor, "a a"], right: Float[torch.Tensor, "b b"]) -> Map:
    return Kronecker(left, right)


class CayleySGD(torch.optim.Optimizer):
    """Steps of matrices stay orthogonal; vectors beside them (norms, clips) take those of Adam."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.beside = [group for group in self.param_groups if any(x.ndim != 2 for x in group["params"])]
        self.adam = torch.optim.Adam([{"params": group["params"]} for group in self.beside]) if self.beside else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.adam is not None:
            for own, group in zip(self.adam.param_groups, self.beside, strict=True):
                own["lr"] = group["lr"]
            self.adam.step()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None and x.ndim == 2:
                    state = self.state[x]
                    state["momentum"] = MOMENTUM * state.get("momentum", 0.0) + x.grad.double()
                    x.copy_(_turned(x.double(), state["momentum"], group["lr"]))


def _turned(x: torch.Tensor, moved: torch.Tensor, rate: float) -> torch.Tensor:
    w = moved @ x.T
    w = w - w.T
    size = w.abs().sum(0).max()
    if not bool(size > 0):
        return x
    half = w * (rate / size / 2)
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    turned: torch.Tensor = torch.linalg.solve(eye + half, (eye - half) @ x)
    return turned
