"""GPTQ: round columns in order, push each rounding error onto the columns not yet rounded.

Source   Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; activation
         order and static groups as in the authors' public code.
Differs  columns in lazily updated batches, rows in parallel; a grid of span k rounds k columns at a time; the parameters of a
         group are weighted in their clipping search by the diagonal of the gram; order="activation" with groups="running"
         forms groups in the permuted order and keeps the permutation as the weight's input map.
Needs    gram [in, in] float32.     Cost  O(out * in^2 + in^3) time, O(in^2) memory.
Update   w[:, j+1:] -= (w[:, j] - q_j) / U[j, j] * U[j, j+1:],  U = upper Cholesky factor of inv(gram + damp * mean_diag * I)
Fails    a gram that cannot be factored is damped tenfold more, up to `damp_limit`, and then rounded without feedback: a named
         fallback. Input channels that were always 0 keep their weights rounded plainly, and are counted.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, EvenlySpaced, Format, Packed, Params, Permutation
from bitpress.formats.dense import code_dtype
from bitpress.quantizers.quantizer import Outcome
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ:
    damp: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    groups: Literal["static", "running"] = "static"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "error feedback by second-order statistics of the layer's input"

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        if self.order not in ("activation", "natural"):
            raise UsageError(f"order={self.order!r}: it is 'activation' or 'natural'.")
        if self.groups not in ("static", "running"):
            raise UsageError(f"groups={self.groups!r}: it is 'static' or 'running'.")
        if not 0 < self.damp <= self.damp_limit or self.lazy < 1:
            raise UsageError(
                f"0 < damp <= damp_limit and lazy >= 1 are needed, got {self.damp}, {self.damp_limit}, {self.lazy}."
            )

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("gptq")
        diagonal = gram.diagonal()
        dead = diagonal <= 0
        fallbacks = (
            [f"{int(dead.sum())} input channels were always zero; their weights are rounded plainly"] if dead.any() else []
        )
        order = _column_order(diagonal, self.order, fmt.grid.span)
        permuted = self.groups == "running" and self.order == "activation"
        factor, damp = self._factor(gram, dead, order)
        if damp is None:
            fallbacks.append(f"the gram could not be factored at damping {self.damp_limit}; rounded without error feedback")
        elif damp > self.damp:
            fallbacks.append(f"the gram needed damping {damp:g} instead of {self.damp:g}")
        ratios = shrink_ratios(self.clip, self.steps, self.smallest)
        importance = torch.where(dead, diagonal[~dead].mean() if not dead.all() else torch.ones(()), diagonal)
        w = w.float()
        if permuted:
            w, importance = w[:, order], importance[order]
            walk = torch.arange(w.shape[1])
        else:
            walk = order
        columns = _Columns(fmt, w, importance, ratios, static=self.groups == "static" or fmt.block.cols == "all")
        columns.round_(walk, factor, self.lazy)
        weight = CompressedWeight((Packed.pack(fmt, columns.codes, columns.params),))
        if permuted:
            weight = CompressedWeight(weight.terms, input_map=Permutation(order.to(torch.int32)))
        return Outcome(weight, tuple(fallbacks), {"damp": damp or 0.0})

    def _factor(
        self, gram: Float[torch.Tensor, "in in"], dead: torch.Tensor, order: torch.Tensor
    ) -> tuple[Float[torch.Tensor, "in in"] | None, float | None]:
        """Factor the inverse in `order`, climbing the damping ladder; (None, None) when even the top does not do."""
        h = gram[order][:, order]
        h.diagonal()[dead[order]] = 1.0
        mean = float(h.diagonal().mean())
        damp = self.damp
        while damp <= self.damp_limit:
            # In float64, and at most two such matrices at a time: for 8,192 inputs each of them is half a gigabyte.
            work = h.double()
            work.diagonal().add_(damp * mean)
            work, failed = torch.linalg.cholesky_ex(work)
            if not int(failed):
                work = torch.cholesky_inverse(work)
                work, failed = torch.linalg.cholesky_ex(work, upper=True)
                if not int(failed) and bool(torch.isfinite(work).all()):
                    return work.float().contiguous(), damp
            damp *= 10
        return None, None


def _column_order(diagonal: torch.Tensor, order: str, span: int) -> torch.Tensor:
    """Give the columns in the order of rounding, whole codes of `span` columns together."""
    if order == "natural":
        return torch.arange(diagonal.numel())
    energy = diagonal.view(-1, span).sum(-1)
    leaders = torch.argsort(energy, descending=True, stable=True) * span
    return (leaders[:, None] + torch.arange(span)).reshape(-1)


class _Columns:
    """The state of one pass over the columns: weights still open, codes chosen, parameters fitted.

    Weights are held transposed, [in, out]: a column of the matrix is then a contiguous row, and feedback writes contiguous rows.
    """

    def __init__(
        self, fmt: Format, w: torch.Tensor, importance: torch.Tensor, ratios: tuple[float, ...], *, static: bool
    ) -> None:
        self.fmt, self.w, self.importance, self.ratios, self.static = fmt, w, importance, ratios, static
        self.shape = (w.shape[0], w.shape[1])
        self.params: Params = fmt.fit(w, importance, ratios)
        self._codes = torch.zeros(self.shape[1] // fmt.grid.span, self.shape[0], dtype=code_dtype(fmt.grid.code_bits))
        self.block_cols = fmt.block.resolve(self.shape, fmt.grid.span)[1]
        self._at_block: dict[int, Params] = {}

    @property
    def codes(self) -> torch.Tensor:
        return self._codes.T.contiguous()

    def round_(self, order: torch.Tensor, factor: torch.Tensor | None, lazy: int) -> None:
        """Round all columns in `order`; `factor` is in that order too. Without a factor nothing is fed back."""
        # Whole codes, and where groups are fitted on the way one group: a fit must see weights with all feedback in.
        lazy = self.block_cols if not self.static else -(-lazy // self.fmt.grid.span) * self.fmt.grid.span
        w = self.w.T[order].contiguous()
        at = order.tolist()
        grid = self.fmt.grid
        for start in range(0, len(at), lazy):
            stop = min(start + lazy, len(at))
            part = w[start:stop]
            if not self.static:
                self._refit(at[start], part.T)
            if factor is None:
                self._round_plainly(part, at[start:stop])
                continue
            own = factor[start:stop, start:stop]
            if isinstance(grid, EvenlySpaced) and native.available() and not w.is_cuda:
                errors = self._round_natively(part, at[start:stop], own, grid)
            else:
                errors = self._round_part(part, at[start:stop], own)
            if stop < len(at):
                w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)

    def _round_part(self, part: torch.Tensor, at: list[int], factor: torch.Tensor) -> torch.Tensor:
        """Round columns one code after another, each error fed to those behind it; give the errors. The reference."""
        span = self.fmt.grid.span
        errors = torch.empty_like(part)
        for i in range(0, len(at), span):
            values = part[i : i + span].T
            difference = values - self._round(values, at[i])
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

    def _round_natively(self, part: torch.Tensor, at: list[int], factor: torch.Tensor, grid: EvenlySpaced) -> torch.Tensor:
        """Do what `_round_part` does in one native call."""
        across = torch.tensor(at) // self.block_cols
        used, group = torch.unique(across, return_inverse=True)
        params = [self._column_params(int(a) * self.block_cols) for a in used]
        zeros = [grid.zero_of(p) for p in params]
        codes, errors = native.round_columns_(
            part,
            factor,
            self._stack([p["scale"] for p in params]),
            zeros[0] if isinstance(zeros[0], float) else self._stack([z for z in zeros if isinstance(z, torch.Tensor)]),
            grid.top,
            group,
        )
        self._codes[torch.tensor(at)] = codes
        return errors

    def _stack(self, params: list[torch.Tensor]) -> Float[torch.Tensor, "groups out"]:
        return torch.stack([p.expand(self.shape[0], 1)[:, 0] for p in params]).contiguous()

    def _round_plainly(self, part: torch.Tensor, at: list[int]) -> None:
        for i in range(0, len(at), self.fmt.grid.span):
            self._round(part[i : i + self.fmt.grid.span].T, at[i])

    def _round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        params = self._column_params(column)
        codes = self.fmt.grid.encode(values, params)
        self._codes[column // self.fmt.grid.span] = codes[:, 0]
        return self.fmt.grid.decode(codes, params)

    def _column_params(self, column: int) -> Params:
        across = column // self.block_cols
        if across not in self._at_block:
            self._at_block[across] = self.fmt.columns(self.params, self.shape, column)
        return self._at_block[across]

    def _refit(self, column: int, group: Float[torch.Tensor, "out cols"]) -> None:
        """Fit the group that begins at `column` to the weights as the feedback has left them."""
        importance = self.importance[column : column + self.block_cols]
        self.params = self.fmt.refit(self.params, self.shape, column, group, importance, self.ratios)
        self._at_block.pop(column // self.block_cols, None)
