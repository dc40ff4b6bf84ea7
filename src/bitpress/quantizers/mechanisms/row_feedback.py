"""Error feedback across rows as well as across columns, for methods whose objective weighs the rows of a weight against each other.

    objective          sum over heads of tr(R D G D'),   D the error of a head's rows, R [row, row], G [in, in]
    columns            within a row as in `error_feedback`, by the factor of G
    rows               w[h, later] -= V[now, later]' V[now, now]'^-1 (w[h, now] - q[h, now]),   V = upper Cholesky factor of inv(R)

With one row at a time this is exact: a row's target holds the errors of the rows before it, and it is rounded by columns under G. Rows that
are rounded together feed nothing to each other. The codes of a row must not depend on other rows, as those of a trellis do.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats import Format, Params
from bitpress.quantizers.mechanisms.error_feedback import Columns, Feedback

__all__ = ["round_by_rows", "round_chosen"]


def round_by_rows(
    w: Float[torch.Tensor, "out in"],
    fmt: Format,
    params: Params,
    feedbacks: Sequence[Feedback],
    factors: Float[torch.Tensor, "heads row row"],
    order: Int[torch.Tensor, " row"],
    rows: int,
    lazy: int,
) -> Int[torch.Tensor, "out codes_across"]:
    """Return the codes under `params`.

    `feedbacks` are those of the columns, one for all heads or for each; `factors` are V of every head, its rows visited in `order` (which V
    has too), so many `rows` at a time.
    """
    heads, row = factors.shape[0], factors.shape[1]
    every = torch.arange(w.shape[0], device=w.device).view(heads, row)[:, order]
    open_ = w[every]  # [heads, row, in] in the order of the visits
    codes = w.new_empty(0)
    whole = w.clone()
    for start in range(0, row, rows):
        now, later = slice(start, start + rows), slice(start + rows, None)
        whole[every[:, now].flatten()] = open_[:, now].flatten(0, 1)
        found, w_hat = round_chosen(whole, fmt, params, feedbacks, every[:, now], lazy)
        codes = found.new_empty(w.shape[0], found.shape[1]) if start == 0 else codes
        codes[every[:, now].flatten()] = found
        rounded = w_hat.unflatten(0, (heads, -1))
        errors = torch.linalg.solve_triangular(factors[:, now, now].mT, open_[:, now] - rounded, upper=False)
        open_[:, later] -= factors[:, now, later].mT @ errors
    return codes


def round_chosen(
    w: Float[torch.Tensor, "out in"],
    fmt: Format,
    params: Params,
    feedbacks: Sequence[Feedback],
    chosen: Int[torch.Tensor, "heads each"],
    lazy: int,
) -> tuple[Int[torch.Tensor, "rows codes"], Float[torch.Tensor, "rows in"]]:
    """Round the chosen rows by columns, with feedback by each head's own gram or by the shared one; return codes and values."""
    codes, values = [], []
    for feedback, rows in zip(feedbacks, chosen.chunk(len(feedbacks)), strict=True):
        at = rows.flatten()
        part, own, took = w, params, at
        if fmt.block.rows == 1:  # else rows of a block have parameters together, and all are rounded
            part, own, took = w[at], _rows_of(fmt, params, at), torch.arange(len(at), device=w.device)
        columns = Columns(fmt, part, feedback.importance, (1.0,), static=True, params=own)
        columns.round_(feedback.order, feedback.factor, lazy)
        codes.append(columns.codes[took])
        values.append(fmt.decode(columns.codes, own)[took])
    return torch.cat(codes), torch.cat(values)


def _rows_of(fmt: Format, params: Params, rows: Int[torch.Tensor, " rows"]) -> Params:
    """Return the parameters of some rows, for blocks of one row."""
    return {p.name: params[p.name][rows] if p.scope == "block" else params[p.name] for p in fmt.grid.params}
