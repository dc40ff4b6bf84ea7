"""Error feedback, column by column, shared by the methods that round as GPTQ does.

    w[:, j+1:] -= (w[:, j] - q_j) / U[j, j] * U[j, j+1:],  U = upper Cholesky factor of inv(gram + damp * mean_diag * I)

`prepare` returns the order and the factor for any gram, even an ill-conditioned one, and names its fallbacks; `Columns` is one pass over
a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.errors import UsageError
from bitpress.finite import all_finite
from bitpress.formats import EvenlySpaced, Format, Params, Tabled
from bitpress.formats.layouts.dense import code_dtype

__all__ = ["Columns", "Feedback", "FitTo", "Order", "check_feedback", "prepare"]

Order = Literal["activation", "natural"]
# Maps a column's rounding error [out, span] to the part that is stored beside the codes and therefore not fed back.
Keep = Callable[[torch.Tensor, int], torch.Tensor]
# Maps a column's weights [out, span] and parameters to the values that are rounded to nearest.
Dither = Callable[[torch.Tensor, Params], torch.Tensor]
# Maps the weights [out, cols] of a group whose turn has come, and its first column, to values and importance that it is fitted to.
FitTo = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Feedback:
    """The order and the factor of error feedback for one gram.

    order       columns in the order of rounding
    factor      U in that order; None if the gram could not be factored
    damp        the damping that was needed
    dead        channels that were always 0
    importance  the gram's diagonal, its mean for dead channels
    fallbacks   what was given up for an ill-conditioned gram
    """

    order: torch.Tensor
    factor: Float[torch.Tensor, "in in"] | None
    damp: float | None
    dead: torch.Tensor
    importance: Float[torch.Tensor, " in"]
    fallbacks: tuple[str, ...]

    def cost(self) -> Float[torch.Tensor, " in"]:
        """Return the cost of a unit squared error in each column after later columns have compensated for it; 0 for dead channels."""
        cost = self.importance.clone()
        if self.factor is not None:
            cost[self.order] = self.factor.diagonal().square().reciprocal()
        return cost.masked_fill_(self.dead, 0.0)


def check_feedback(order: str, damp: float, damp_limit: float, lazy: int) -> None:
    """Raise UsageError for invalid settings."""
    if order not in ("activation", "natural"):
        raise UsageError(f"order={order!r}: must be 'activation' or 'natural'.")
    if not 0 < damp <= damp_limit or lazy < 1:
        raise UsageError(f"damp must be above 0 and at most damp_limit, and lazy 1 or more; got {damp}, {damp_limit}, {lazy}.")


def prepare(gram: Float[torch.Tensor, "in in"], order: str, span: int, damp: float, damp_limit: float) -> Feedback:
    """Order the columns and factor the gram; each failure raises the damping tenfold, up to `damp_limit`.

    Channels that were always 0 are isolated, with a diagonal of 1: nothing is fed to them or from them. That is no fallback.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    fallbacks: list[str] = []
    columns = _column_order(diagonal, order, span)
    factor, needed = _factor(gram, dead, columns, damp, damp_limit)
    if needed is None:
        fallbacks.append(f"the gram could not be factored at damping {damp_limit}; rounded without error feedback")
    elif needed > damp:
        fallbacks.append(f"the gram needed damping {needed:g} instead of {damp:g}")
    importance = torch.where(dead, diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(()), diagonal)
    return Feedback(columns, factor, needed, dead, importance, tuple(fallbacks))


def _factor(
    gram: Float[torch.Tensor, "in in"], dead: torch.Tensor, order: torch.Tensor, damp: float, damp_limit: float
) -> tuple[Float[torch.Tensor, "in in"] | None, float | None]:
    """Factor the inverse in `order` with rising damping; return (None, None) if even the largest fails."""
    h = gram[order][:, order]
    h.diagonal()[dead[order]] = 1.0
    mean = float(h.diagonal().mean())
    while damp <= damp_limit:
        # In float64, and at most two such matrices at a time: for 8,192 inputs each of them is half a gigabyte.
        work = h.double()
        work.diagonal().add_(damp * mean)
        work, failed = torch.linalg.cholesky_ex(work)
        if not int(failed):
            work = torch.cholesky_inverse(work)
            work, failed = torch.linalg.cholesky_ex(work, upper=True)
            if not int(failed) and all_finite(work):
                return work.float().contiguous(), damp
        damp *= 10
    return None, None


def _column_order(diagonal: torch.Tensor, order: str, span: int) -> torch.Tensor:
    """Return the columns in the order of rounding; the `span` columns of a code stay together."""
    if order == "natural":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    energy = diagonal.view(-1, span).sum(-1)
    leaders = torch.argsort(energy, descending=True, stable=True) * span
    return (leaders[:, None] + torch.arange(span, device=leaders.device)).reshape(-1)


class Columns:
    """The state of one pass over the columns: weights not yet rounded, codes, parameters.

    Weights are held transposed, [in, out]: a column of the matrix is then a contiguous row, and feedback writes contiguous rows.
    Errors larger than `least` after all feedback are stored in `kept` in half precision, and only their remainder is fed on.
    """

    def __init__(
        self,
        fmt: Format,
        w: torch.Tensor,
        importance: torch.Tensor,
        ratios: tuple[float, ...],
        *,
        static: bool,
        params: Params | None = None,
        keep: Keep | None = None,
        least: Float[torch.Tensor, "in out"] | None = None,
        dither: Dither | None = None,
        fit_to: FitTo | None = None,
    ) -> None:
        self.fmt, self.w, self.importance, self.ratios, self.static = fmt, w, importance, ratios, static
        self.keep, self.least, self.dither, self.fit_to = keep, least, dither, fit_to
        self.kept = None if least is None else torch.zeros_like(least)
        self.shape = (w.shape[0], w.shape[1])
        self.params: Params = fmt.fit(w, importance, ratios) if params is None else params
        codes_down = self.shape[0] // fmt.rows_per_code
        self._codes = torch.zeros(
            self.shape[1] // fmt.grid.span, codes_down, dtype=code_dtype(fmt.grid.code_bits), device=w.device
        )
        self.block_cols = fmt.block.resolve(self.shape, fmt.grid.span)[1]
        self._at_block: dict[int, Params] = {}

    @property
    def codes(self) -> torch.Tensor:
        return self._codes.T.contiguous()

    def round_(self, order: torch.Tensor, factor: torch.Tensor | None, lazy: int) -> None:
        """Round all columns in `order`; `factor` has the same order. Without a factor nothing is fed back."""
        # Whole codes, and a whole group if groups are fitted on the way: a fit must see weights after all feedback.
        lazy = self.block_cols if not self.static else -(-lazy // self.fmt.grid.span) * self.fmt.grid.span
        w = self.w.T[order].contiguous()
        at = order.tolist()
        grid = self.fmt.grid
        levels = grid if isinstance(grid, EvenlySpaced) else grid.table if isinstance(grid, Tabled) else None
        for start in range(0, len(at), lazy):
            stop = min(start + lazy, len(at))
            part = w[start:stop]
            if not self.static:
                self._refit(at[start], part.T.contiguous())
            if factor is None:
                self._round_plainly(part, at[start:stop])
                continue
            own = factor[start:stop, start:stop]
            plain = self.keep is None and self.dither is None
            if levels is not None and plain and native.available() and w.device.type == "cpu":
                errors = self._round_natively(part, at[start:stop], own, levels)
            else:
                errors = self._round_part(part, at[start:stop], own)
            if stop < len(at):
                w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)

    def _round_part(self, part: torch.Tensor, at: list[int], factor: torch.Tensor) -> torch.Tensor:
        """Round columns one code after another, each error fed to the later ones; return the errors. The reference."""
        span = self.fmt.grid.span
        errors = torch.empty_like(part)
        for i in range(0, len(at), span):
            values = part[i : i + span].T
            difference = self._left_over(values, at[i])
            # One step for `span` columns at once: the error through the inverse of its own triangle of the factor.
            own = factor[i : i + span, i : i + span]
            if span == 1:
                error = difference.div_(own)
            else:
                error = torch.linalg.solve_triangular(own, difference, upper=True, left=False)
            errors[i : i + span] = error.T
            if i + span < len(at):
                part[i + span :].addmm_(factor[i : i + span, i + span :].T, error.T, alpha=-1)
        return errors

    def _round_natively(
        self, part: torch.Tensor, at: list[int], factor: torch.Tensor, levels: EvenlySpaced | native.LevelTable
    ) -> torch.Tensor:
        """Do the work of `_round_part` in one native call."""
        here = torch.tensor(at)
        used, group = torch.unique(here // self.block_cols, return_inverse=True)
        params = [self._column_params(int(a) * self.block_cols) for a in used]
        least = None if self.least is None else self.least[here]
        scale = self._stack([p["scale"] for p in params])
        to = levels if isinstance(levels, native.LevelTable) else self._even_levels(levels, params)
        codes, errors, kept = native.round_columns_(part, factor, scale, to, group, least)
        self._codes[here] = codes
        if self.kept is not None and kept is not None:
            self.kept[here] = kept
        return errors

    def _even_levels(self, grid: EvenlySpaced, params: list[Params]) -> native.EvenLevels:
        zeros = [grid.zero_of(p) for p in params]
        stored = [z for z in zeros if isinstance(z, torch.Tensor)]
        return native.EvenLevels(self._stack(stored) if stored else float(zeros[0]), grid.top)

    def _stack(self, params: list[torch.Tensor]) -> Float[torch.Tensor, "groups out"]:
        return torch.stack([p.expand(self.shape[0], 1)[:, 0] for p in params]).contiguous()

    def _round_plainly(self, part: torch.Tensor, at: list[int]) -> None:
        for i in range(0, len(at), self.fmt.grid.span):
            self._left_over(part[i : i + self.fmt.grid.span].T, at[i])

    def _left_over(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """Round, and return the error minus the stored part."""
        difference = values - self._round(values, column)
        if self.kept is not None and self.least is not None:
            here, own = slice(column, column + self.fmt.grid.span), difference.T
            self.kept[here] = torch.where(own.abs() > self.least[here], own, 0.0).half()
            difference = difference - self.kept[here].T
        return difference if self.keep is None else difference - self.keep(difference, column)

    def _round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        params = self._column_params(column)
        codes = self.fmt.encode_columns(values if self.dither is None else self.dither(values, params), params)
        self._codes[column // self.fmt.grid.span] = codes[:, 0]
        return self.fmt.decode_columns(codes, params)

    def _column_params(self, column: int) -> Params:
        across = column // self.block_cols
        if across not in self._at_block:
            self._at_block[across] = self.fmt.columns(self.params, self.shape, column)
        return self._at_block[across]

    def _refit(self, column: int, group: Float[torch.Tensor, "out cols"]) -> None:
        """Fit the group that begins at `column` to the weights after feedback."""
        importance = self.importance[column : column + self.block_cols]
        if self.fit_to is not None:
            group, importance = self.fit_to(group, column)
        self.params = self.fmt.refit(self.params, self.shape, column, group, importance, self.ratios)
        self._at_block.pop(column // self.block_cols, None)
