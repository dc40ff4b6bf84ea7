"""Coordinate descent over the codes of a weight, shared by the methods that set each code with all others fixed.

    error = sum over rows of (w - w_hat) gram (w - w_hat)'

A sweep visits each code once, in order, and sets it to the level nearest to the best value with all others fixed. Done code by code,
this reads the gram once per column. Here a whole sweep without rounding is one triangular solve, and rounding feeds its errors forward
through the inverse of the same triangle, as GPTQ does with its own, in lazily updated batches (`Columns`):

    gram = D + L + L'         in the order of the visits, D its diagonal (in blocks of a code's columns)
    without rounding          w_hat += (D + L)^-1 gram (w - w_hat)
    with rounding             later columns -= error of this one * factor[this, later],      factor = ((D + L)^-1 D)'

The triangle depends on the gram alone, so all sweeps share one. It needs no damping: D + L is at least as far from singular as D.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from jaxtyping import Integer as Int

from bitpress.formats import Format, Params, Streamed
from bitpress.quantizers.mechanisms.error_feedback import Columns

__all__ = ["Descent", "better_rows", "prepare_descent", "take_rows"]

# Damping, a share of a diagonal block's mean: for codes of several weights the block may be singular.
RIDGE = 1e-4
LAZY = 128


@dataclass(frozen=True)
class Descent:
    """The part of a sweep that depends on the gram alone.

    gram        divided by its mean diagonal; a channel that was always zero is isolated, with a diagonal of 1
    order       columns in the order of the visits
    inverse     D^-1 in that order
    triangle    D^-1 (D + L)
    factor      ((D + L)^-1 D)'
    """

    gram: Float[torch.Tensor, "in in"]
    order: Int[torch.Tensor, " in"]
    inverse: Float[torch.Tensor, "codes span span"]
    triangle: Float[torch.Tensor, "in in"]
    factor: Float[torch.Tensor, "in in"]

    def errors(self, difference: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, " out"]:
        """Return the squared output error of every row, divided by the gram's mean diagonal."""
        return (difference @ self.gram).mul_(difference).sum(1)

    def relax(self, w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        """Return the weight after one sweep from `w_hat` without rounding."""
        codes, span, _ = self.inverse.shape
        pull = ((w - w_hat) @ self.gram)[:, self.order].T.reshape(codes, span, -1)
        pull = torch.bmm(self.inverse, pull).reshape(codes * span, -1)
        step = torch.linalg.solve_triangular(self.triangle, pull, upper=False, unitriangular=True)
        relaxed = w_hat.clone()
        relaxed[:, self.order] += step.T
        # A gram that is not positive definite may diverge.
        return torch.where(torch.isfinite(relaxed), relaxed, w_hat)

    def sweep(
        self, w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"], fmt: Format, params: Params
    ) -> Int[torch.Tensor, "codes_down codes_across"]:
        """Return the codes after one sweep from `w_hat` under `params`."""
        columns = Columns(fmt, self.relax(w, w_hat), self.gram.diagonal(), (1.0,), static=True, params=params)
        columns.round_(self.order, self.factor, LAZY)
        return columns.codes


def better_rows(
    fmt: Format, trial: Float[torch.Tensor, " out"], error: Float[torch.Tensor, " out"]
) -> Bool[torch.Tensor, " out"]:
    """Return a mask of the rows whose error fell: all or none if codes run down the columns, where rows cannot be taken one by one."""
    return (trial.sum() < error.sum()).expand(len(error)) if isinstance(fmt.grid, Streamed) else trial < error


def take_rows(fmt: Format, rows: Bool[torch.Tensor, " out"], codes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return `codes` in the rows of a mask of `better_rows`, and `others` elsewhere."""
    return torch.where(rows[:: fmt.rows_per_code, None], codes, others)


def prepare_descent(
    gram: Float[torch.Tensor, "in in"], order: Int[torch.Tensor, " in"], span: int = 1, damp: float = 0.0
) -> Descent:
    """Prepare sweeps over codes of `span` columns in `order`; `damp` times the mean of the gram's diagonal is added to it."""
    dead = gram.diagonal() <= 0
    h = torch.where(dead | dead[:, None], 0.0, gram)
    h = h / (h.diagonal()[~dead].mean() if not dead.all() else 1.0)
    h.diagonal().add_(damp)
    h.diagonal()[dead] = 1.0
    codes = len(order) // span
    tiles = h[order][:, order].reshape(codes, span, codes * span)
    blocks = torch.stack([tiles[i, :, i * span : (i + 1) * span] for i in range(codes)])
    if span > 1:
        blocks = blocks + RIDGE * blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(span, device=h.device)
    inverse = torch.linalg.inv(blocks)
    triangle = torch.bmm(inverse, tiles).reshape(codes * span, codes * span)
    code = torch.arange(codes, device=h.device).repeat_interleave(span)
    triangle = triangle.mul_(code[:, None] > code).fill_diagonal_(1.0)
    factor = torch.linalg.solve_triangular(
        triangle, torch.eye(len(order), device=h.device), upper=False, unitriangular=True
    ).T.contiguous()
    return Descent(h, order, inverse, triangle, factor)
