"""PB-LLM: a tenth of the weights, the salient ones, in 8 bits, the others in one bit, rounded with error feedback.

Source   Shang et al. 2023, "PB-LLM: Partially Binarized Large Language Models", its part after training; saliency, the order of work
         and the feedback as in the authors' public code (`gptq_pb/gptq.py`).
Differs  every row has as many salient weights as every other, where the paper takes the share of the whole weight. They store what their
         code of one bit lacks, in 8 bits with a scale a row, beside the mask of one bit a weight. store="fp16" is a sparse term of float16,
         32 bits each with their position and a share of the whole weight: smaller below one weight in 24. The others have scales but no mean (the code's
         xnor). A scale averages the other weights only, where the code also averages over the gaps; it is weighted by the gram's
         diagonal, and belongs to a block of the format instead of a row. Any format can replace the one bit.
Needs    gram [in, in] float32.     Cost  as GPTQ; a bit a weight and 8 a salient one.
Update   saliency = w^2 / U[j, j]^2, or |w|;  the share `salient` of the weights with the largest saliency stores the remainder of its
         codes, after the feedback of all earlier columns; their errors are not fed back
Fails    as GPTQ. NumericsError when a salient weight is beyond the range of what stores it.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Kept, Packed, Term, parse_format
from bitpress.formats.terms.sparse import sparse
from bitpress.quantizers.mechanisms.error_feedback import Columns, Feedback, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.outliers import without
from bitpress.quantizers.mechanisms.storage import sparse_bytes, term_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["PBLLM"]

EIGHT = "int8-row"
# Of the range that the weights lack before any feedback.
HEADROOM = 1.25


@dataclass(frozen=True)
class PBLLM(Quantizer):
    salient: float = 0.1
    store: Literal["int8", "fp16"] = "int8"
    measure: Literal["hessian", "magnitude"] = "hessian"
    damp: float = 0.01
    order: Order = "activation"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "salient weights in 8 bits, the rest binarized with error feedback"
    paper: ClassVar[str] = "P284"
    bits: ClassVar[tuple[float, float]] = (1, 3)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if not 0 <= self.salient < 1:
            raise UsageError(f"salient={self.salient}: must be a share of the weights, 0 or more and below 1.")
        if self.store not in ("int8", "fp16"):
            raise UsageError(f"store={self.store!r}: must be 'int8' or 'fp16'.")
        if self.measure not in ("hessian", "magnitude"):
            raise UsageError(f"measure={self.measure!r}: must be 'hessian' or 'magnitude'.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        own = fmt.nbytes((shape[0] * parts, shape[1]))
        if self.store == "fp16":
            return own + sparse_bytes(int(self.salient * math.prod(shape)), shape, parts)
        count = int(self.salient * shape[1])
        return own + (
            term_bytes("kept", shape, parts, each=shape[0], axis="columns", count=count, format=EIGHT) if count else 0
        )

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("pb_llm")
        w = w.float()
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        salient = self.salient_weights(w, feedback)
        ratios = shrink_ratios("mse", self.steps, self.smallest)
        if fmt.grid.span == 1:
            params = fmt.fit(without(w, salient, fmt), feedback.importance * ~salient, ratios)
        else:  # a codeword has to fit a salient weight's neighbours too
            params = fmt.fit(w, feedback.importance, ratios)
        rest: _EightBits | None = None
        least = None
        if self.store == "int8":
            rest = _EightBits(w - fmt.decode(fmt.encode(w, params), params), salient)
        else:
            least = torch.where(salient, -1.0, math.inf).T.contiguous()
        columns = Columns(
            fmt, w, feedback.importance, ratios, static=True, params=params, least=least, keep=rest if salient.any() else None
        )
        columns.round_(feedback.order, feedback.factor, self.lazy)
        terms: list[Term] = [Packed.pack(fmt, columns.codes, columns.params)]
        if columns.kept is not None:
            terms.append(sparse(columns.kept.T, salient))
        elif rest is not None and salient.any():
            terms.append(rest.term())
        figures = {"damp": feedback.damp or 0.0, "salient": float(salient.float().mean())}
        return Outcome(CompressedWeight(tuple(terms)), feedback.fallbacks, figures)

    def salient_weights(self, w: Float[torch.Tensor, "out in"], feedback: Feedback) -> Bool[torch.Tensor, "out in"]:
        """Return a mask of the share `salient`, of every row or of the whole weight; the first of equals is taken."""
        saliency = w.abs() if self.measure == "magnitude" else w.square() * feedback.cost()
        if self.store == "fp16":
            saliency = saliency.flatten()[None]
        count = int(self.salient * saliency.shape[1])
        first = saliency.argsort(dim=1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, first, True).view(w.shape)


class _EightBits:
    """Rounds what the codes of salient weights lack to 8 bits, with one scale a row, as columns are rounded."""

    def __init__(self, lacking: Float[torch.Tensor, "out in"], salient: Bool[torch.Tensor, "out in"]) -> None:
        self.format, self.salient = parse_format(EIGHT), salient
        # Feedback moves weights before they are rounded; what is beyond the range is fed on.
        self.params = self.format.fit(torch.where(salient, lacking, 0.0) * HEADROOM)
        self.codes = torch.zeros(salient.shape, dtype=torch.uint8, device=salient.device)

    def __call__(self, error: Float[torch.Tensor, "out span"], column: int) -> Float[torch.Tensor, "out span"]:
        here = slice(column, column + error.shape[1])
        self.codes[:, here] = self.format.grid.encode(error, self.params)
        return torch.where(self.salient[:, here], self.format.grid.decode(self.codes[:, here], self.params), 0.0)

    def term(self) -> Kept:
        """Return the salient weights of every row."""
        codes = self.codes[self.salient].view(len(self.codes), -1)
        return Kept.place(Packed.pack(self.format, codes, self.params), "columns", self.salient)
