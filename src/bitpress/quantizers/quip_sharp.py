"""QuIP#, without its fine-tuning: eight weights at a time as a point of the E8 lattice, with error feedback, then more sweeps.

Source   Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks": BlockLDLQ and
         the books; scales, damping and the sweeps after BlockLDLQ as in the authors' public code (`lib/algo/quip.py`). The balance of
         channels (its `rescale_WH`) and the random Hadamard rotation of both sides are transforms, done before.
Differs  every block of the format has a scale (rows with `e8p-row`), where the code has one per matrix. With such scales the weights
         have a root mean square of 1.03 instead of 0.9 for one book, and 0.93 instead of 1.03 for two books of 2 bits (8% less error
         on a small model). Every row keeps the best of its sweeps, since a sweep may make it worse; 2 sweeps instead of 10; the
         second book is a separate term.
Needs    gram [in, in] float32.     Cost  as GPTQ for every sweep, and a search of the lattice for every code.
Update   block column k:  q_k = Q(w_k + (w - w_hat)[:, earlier] A[earlier, k]),   A from the block factor of the gram
         sweep:           q_k = Q(w_hat_k + (w - w_hat) gram[:, k] inv(gram[k, k]))
         residual:        Q(v) = Q1(v) + Q2(v - Q1(v)),   Q2 the book named by `residual`: 1 bit (e81b) or 2 bits (e8p) more
Fails    as GPTQ; FormatError for other grids than e8p.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.formats.grids.lattice import E8P, E81B, Lattice
from bitpress.formats.layouts.dense import code_dtype
from bitpress.quantizers.mechanisms.coordinate_descent import prepare_descent
from bitpress.quantizers.mechanisms.error_feedback import Columns, Order, check_feedback, prepare
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served

__all__ = ["QuIPSharp"]

# For every second book: the root mean square that weights are brought to, and how much finer the second book is than the first.
BOOKS: dict[str, tuple[Lattice | None, float, float]] = {
    "none": (None, 1.03, 1.0),
    "e81b": (E81B, 0.98, 2.04),
    "e8p": (E8P, 0.93, 3.45),
}


@dataclass(frozen=True)
class QuIPSharp(Quantizer):
    """`rms` is the root mean square to which weights are scaled before rounding; None: the value for the books."""

    residual: Literal["none", "e81b", "e8p"] = "none"
    rms: float | None = None
    sweeps: int = 2
    damp: float = 0.01
    order: Order = "natural"
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[dict[str, Any], ...]] = ({"name": "balance"}, {"name": "hadamard", "outputs": True})
    summary: ClassVar[str] = "points of the E8 lattice with error feedback, after a random Hadamard rotation"
    paper: ClassVar[str] = "P204"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("e8p-*",)

    def __post_init__(self) -> None:
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if self.residual not in BOOKS:
            raise UsageError(f"residual={self.residual!r}: must be one of {', '.join(BOOKS)}.")
        if self.sweeps < 0 or (self.rms is not None and not self.rms > 0):
            raise UsageError(f"sweeps must be 0 or more and rms above 0, got {self.sweeps}, {self.rms}.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        book = BOOKS[self.residual][0]
        stacked = (shape[0] * parts, shape[1])
        second = 0 if book is None else Format(book, fmt.block, fmt.scale).nbytes(stacked)
        return fmt.nbytes(stacked) + second

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("quip_sharp", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("quip_sharp")
        w = w.float()
        second, rms, finer = BOOKS[self.residual]
        rms = self.rms or rms
        params = fmt.fit(w * (E8P.rms / rms))
        rest = None if second is None else _Rest(Format(second, fmt.block, fmt.scale), w * (second.rms / rms / finer))
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        descent = prepare_descent(gram, feedback.order, fmt.grid.span, self.damp)
        best: list[torch.Tensor] = []
        error = torch.full((w.shape[0],), torch.inf, device=w.device)
        target, factor = w, feedback.factor
        for _ in range(1 + self.sweeps):
            columns = Columns(fmt, target, feedback.importance, (1.0,), static=True, params=params, keep=rest)
            columns.round_(feedback.order, factor, self.lazy)
            codes = [columns.codes] if rest is None else [columns.codes, rest.codes.T.contiguous()]
            w_hat = fmt.decode(codes[0], params)
            if rest is not None:
                w_hat += rest.fmt.decode(codes[1], rest.params)
            trial = descent.errors(w_hat - w)
            better = trial < error
            best = codes if not best else [torch.where(better[:, None], c, b) for c, b in zip(codes, best, strict=True)]
            error = torch.minimum(trial, error)
            target, factor = descent.relax(w, w_hat), descent.factor
        terms = [Packed.pack(fmt, best[0], params)]
        if rest is not None:
            terms.append(Packed.pack(rest.fmt, best[1], rest.params))
        return Outcome(CompressedWeight(tuple(terms)), feedback.fallbacks, {"damp": feedback.damp or 0.0})


class _Rest:
    """Encodes the error of the first book with the second."""

    def __init__(self, fmt: Format, w: Float[torch.Tensor, "out in"]) -> None:
        self.fmt, self.params, self.shape = fmt, fmt.fit(w), (w.shape[0], w.shape[1])
        self.codes = torch.zeros(w.shape[1] // fmt.grid.span, w.shape[0], dtype=code_dtype(fmt.grid.code_bits), device=w.device)

    def __call__(self, error: Float[torch.Tensor, "out span"], column: int) -> Float[torch.Tensor, "out span"]:
        params = self.fmt.columns(self.params, self.shape, column)
        codes = self.fmt.grid.encode(error, params)
        self.codes[column // self.fmt.grid.span] = codes[:, 0]
        return self.fmt.grid.decode(codes, params)
