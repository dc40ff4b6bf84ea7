"""AQLM, without its fine-tuning: sums of learned codewords; codes and words are optimised in turn for the layer's output.

Source   Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization", and its public code
         (`aq.py`, `beam_search_xtx.py`, `aq_engine.py`): each book starts by k-means on the residual of the books before it;
         then words, scales and codes in turn until a round gains less than `tolerance`.
Differs  the first codes are chosen with error feedback. The beam holds sums for one group of weights at a time, the others fixed,
         where the paper's holds whole rows; a code stays unless the beam improves it. Words are the least squares solution by
         conjugate gradients and scales are solved for, where the paper uses Adam.
Needs    gram [in, in] float32.     Cost  every round as GPTQ, (steps + 2) * out * in^2, and a beam search for every code.
Update   codes:   argmin |(t - s sum_m words[m, code_m]) R|^2,  R R' = gram[k, k],  t the best value of group k with all others fixed
         words:   gradient = sum over the groups with that code  s (w - w_hat) gram[:, k];  scales as in `row_scales`
Fails    as GPTQ; FormatError for formats without learned words.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.calibration.stats import Stats
from bitpress.errors import NumericsError, UsageError
from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.formats.grids.additive_book import beam_search
from bitpress.formats.grids.clusters import cluster, spread_sample
from bitpress.formats.grids.nearest import nearest
from bitpress.formats.layouts.dense import code_dtype
from bitpress.quantizers.mechanisms.coordinate_descent import Descent, prepare_descent
from bitpress.quantizers.mechanisms.error_feedback import Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.groups import metric_roots, walk
from bitpress.quantizers.mechanisms.row_scales import solve_scales
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["AQLM"]

# Vectors per word, and rounds, of the k-means that starts the books.
VECTORS_PER_WORD = 64
FIRST_ROUNDS = 16
# Share of the first squared gradient: smaller steps would follow rounding errors, also where books can trade a constant.
SETTLED = 1e-8


@dataclass(frozen=True)
class AQLM(Quantizer):
    rounds: int = 6
    beam: int = 16
    steps: int = 12
    tolerance: float = 0.01
    damp: float = 0.01
    order: Order = "activation"
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "sums of codewords learned from the layer's output, codes by beam search"
    paper: ClassVar[str] = "P295"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("aq*", "vq*")

    def __post_init__(self) -> None:
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if self.rounds < 0 or self.beam < 1 or self.steps < 1 or not 0 <= self.tolerance < 1:
            raise UsageError(
                "rounds of 0 or more, beam and steps of 1 or more and 0 <= tolerance < 1 are needed, "
                f"got {self.rounds}, {self.beam}, {self.steps}, {self.tolerance}."
            )

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("aqlm", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("aqlm")
        w = w.float()
        span = fmt.grid.span
        feedback = prepare(gram, self.order, span, self.damp, self.damp_limit)
        params = first_books(w, fmt)
        descent = prepare_descent(gram, feedback.order, span, self.damp)
        roots = metric_roots(feedback.factor, w.shape[1], span, w.device)
        codes = self._search(w, feedback.order, feedback.factor, roots, fmt, params)
        best, least = (codes, params), torch.inf
        roots = torch.linalg.cholesky(torch.linalg.inv(descent.inverse))
        done = 0
        for done in range(self.rounds + 1):
            params = self._learned(w, codes, params, descent, fmt)
            w_hat = fmt.decode(codes, params)
            error = float(descent.errors(w_hat - w).sum())
            settled = not error < least * (1 - self.tolerance)
            if error < least:
                best, least = (codes, params), error
            if settled or done == self.rounds:
                break
            codes = self._search(descent.relax(w, w_hat), descent.order, descent.factor, roots, fmt, params, codes)
        weight = CompressedWeight((Packed.pack(fmt, *best),))
        return Outcome(weight, feedback.fallbacks, {"damp": feedback.damp or 0.0, "rounds": float(done)})

    def _search(
        self,
        w: Float[torch.Tensor, "out in"],
        order: Int[torch.Tensor, " in"],
        factor: Float[torch.Tensor, "in in"] | None,
        roots: Float[torch.Tensor, "groups span span"],
        fmt: Format,
        params: Params,
        before: Int[torch.Tensor, "out groups"] | None = None,
    ) -> Int[torch.Tensor, "out groups"]:
        """Choose every code in order; each error is fed to the codes after it."""
        shape, grid = (w.shape[0], w.shape[1]), fmt.grid
        books = _books(params)
        bits = grid.code_bits // len(books)
        codes = torch.zeros(shape[1] // grid.span, shape[0], dtype=code_dtype(grid.code_bits), device=books.device)

        def choose(target: torch.Tensor, place: int, column: int) -> torch.Tensor:
            at = column // grid.span
            own = fmt.columns(params, shape, column)
            vectors = target / torch.where(own["scale"] == 0, 1.0, own["scale"]) @ roots[place]
            parts = beam_search(vectors, books @ roots[place], self.beam)
            code = sum(part << (bits * m) for m, part in enumerate(parts)).to(codes.dtype)[:, None]
            values = grid.decode(code, own)
            if before is not None:
                kept = grid.decode(before[:, at : at + 1], own)
                new, old = (((target - v) @ roots[place]).square().sum(1, keepdim=True) for v in (values, kept))
                code = torch.where(new < old, code, before[:, at : at + 1])
                values = torch.where(new < old, values, kept)
            codes[at] = code[:, 0]
            return values

        walk(w, order, factor, grid.span, self.lazy, choose)
        return codes.T.contiguous()

    def _learned(self, w: torch.Tensor, codes: torch.Tensor, params: Params, descent: Descent, fmt: Format) -> Params:
        """Return improved words and scales for the codes."""
        words = solve_words(w, codes, params, descent.gram, fmt, self.steps)
        trial = fmt.stored({**params, "words": words.view_as(params["words"])})
        before, after = (float(descent.errors(fmt.decode(codes, p) - w).sum()) for p in (params, trial))
        if after < before:
            params = trial
        return solve_scales(w, codes, params, descent.gram, fmt) if fmt.block.rows == 1 else params


def first_books(w: Float[torch.Tensor, "out in"], fmt: Format) -> Params:
    """Scale every block to a root mean square of 1, and cluster the residual of the earlier books.

    All vectors weigh the same: weights by the gram's diagonal ended 5% worse, measured on attention weights of a small model.
    """
    if not bool(torch.isfinite(w).all()):
        raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    blocks = w.view(w.shape[0] // rows, rows, w.shape[1] // cols, cols)
    top = blocks.abs().amax((1, 3), keepdim=True)
    top = torch.where(top > 0, top, 1.0)
    scale = (blocks / top).square().mean((1, 3), keepdim=True).sqrt() * top
    scaled = (blocks / torch.where(scale > 0, scale, 1.0)).reshape(-1, fmt.grid.span)
    shape = next(p.shape for p in fmt.grid.params if p.name == "words")
    books = shape[0] if len(shape) == 3 else 1
    left = scaled[spread_sample(len(scaled), VECTORS_PER_WORD * shape[-2]).to(scaled.device)]
    words = []
    for _ in range(books):
        words.append(cluster(left, torch.ones_like(left[:, :1]), shape[-2], FIRST_ROUNDS))
        left = left - words[-1][nearest(left, words[-1])]
    return fmt.stored({"scale": scale[:, 0, :, 0], "words": torch.stack(words).view(shape)})


def solve_words(
    w: Float[torch.Tensor, "out in"],
    codes: Int[torch.Tensor, "out groups"],
    params: Params,
    gram: Float[torch.Tensor, "in in"],
    fmt: Format,
    steps: int,
) -> Float[torch.Tensor, "books count span"]:
    """Take `steps` of conjugate gradients toward the words of least output error, each number by its own curvature."""
    words = _books(params)
    books, count, span = words.shape
    bits = fmt.grid.code_bits // books
    at = torch.stack([((codes.int() >> (bits * m)) & (count - 1)).flatten().long() for m in range(books)])
    ones = torch.ones_like(params["words"])
    scale = fmt.decode(codes, {**params, "words": ones}) / books

    def product(x: torch.Tensor) -> torch.Tensor:
        values = x[0].index_select(0, at[0])
        for book, i in zip(x[1:], at[1:], strict=True):
            values += book.index_select(0, i)
        return values.view_as(w) * scale

    def gathered(y: torch.Tensor) -> torch.Tensor:
        vectors = (y * scale).view(-1, span)
        return torch.stack([vectors.new_zeros(count, span).index_add_(0, i, vectors) for i in at])

    curvature = gathered(scale * gram.diagonal())
    curvature = torch.where(curvature > 0, curvature, 1.0)
    residual = gathered((w - product(words)) @ gram)
    step = residual / curvature
    direction, size = step, float((residual * step).sum())
    settled = SETTLED * size
    for _ in range(steps):
        image = gathered(product(direction) @ gram)
        curve = float((direction * image).sum())
        if not curve > 0 or size <= settled:
            break
        words = words + size / curve * direction
        residual = residual - size / curve * image
        step = residual / curvature
        size, last = float((residual * step).sum()), size
        direction = step + size / last * direction
    return words


def _books(params: Params) -> Float[torch.Tensor, "books count span"]:
    """Return the words of all books, with an axis for books even if there is one."""
    words = params["words"]
    return words if words.ndim == 3 else words[None]
