"""PB-LLM: a few salient weights stored apart in half precision, the others in one bit, rounded with error feedback.

Source   Shang et al. 2023, "PB-LLM: Partially Binarized Large Language Models", its part after training; saliency, the order of work
         and the feedback as in the authors' public code (`gptq_pb/gptq.py`).
Differs  salient weights are float16 in a sparse term, 32 bits each with their position, where the paper counts 8 bits and a mask of
         one bit per weight; `salient` is therefore 2% instead of 10% of the weights. The others have scales but no mean (the code's
         xnor). A scale averages the other weights only, where the code also averages over the gaps; it is weighted by the gram's
         diagonal, and belongs to a block of the format instead of a row. Any format can replace the one bit.
Needs    gram [in, in] float32.     Cost  as GPTQ; 4 bytes a salient weight.
Update   saliency = w^2 / U[j, j]^2, or |w|;  the share `salient` of the weights with the largest saliency stores the remainder of its
         codes, after the feedback of all earlier columns; their errors are not fed back
Fails    as GPTQ. NumericsError when a salient weight is beyond the range of float16.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Packed
from bitpress.formats.terms.sparse import sparse
from bitpress.quantizers.mechanisms.error_feedback import Columns, Feedback, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.outliers import without
from bitpress.quantizers.mechanisms.storage import sparse_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["PBLLM"]


@dataclass(frozen=True)
class PBLLM(Quantizer):
    salient: float = 0.02
    measure: Literal["hessian", "magnitude"] = "hessian"
    damp: float = 0.01
    order: Order = "activation"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "salient weights in half precision, the rest binarized with error feedback"
    paper: ClassVar[str] = "P284"
    bits: ClassVar[tuple[float, float]] = (1, 2)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        if not 0 <= self.salient < 1:
            raise UsageError(f"salient={self.salient}: must be a share of the weights, 0 or more and below 1.")
        if self.measure not in ("hessian", "magnitude"):
            raise UsageError(f"measure={self.measure!r}: must be 'hessian' or 'magnitude'.")

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        return fmt.nbytes((shape[0] * parts, shape[1])) + sparse_bytes(int(self.salient * math.prod(shape)), shape, parts)

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
        least = torch.where(salient, -1.0, math.inf).T.contiguous()
        columns = Columns(fmt, w, feedback.importance, ratios, static=True, params=params, least=least)
        columns.round_(feedback.order, feedback.factor, self.lazy)
        assert columns.kept is not None
        weight = CompressedWeight((Packed.pack(fmt, columns.codes, columns.params), sparse(columns.kept.T, salient)))
        figures = {"damp": feedback.damp or 0.0, "salient": float(salient.float().mean())}
        return Outcome(weight, feedback.fallbacks, figures)

    def salient_weights(self, w: Float[torch.Tensor, "out in"], feedback: Feedback) -> Bool[torch.Tensor, "out in"]:
        """Return a mask of the share `salient` of all weights; the first of equals is taken."""
        saliency = w.abs() if self.measure == "magnitude" else w.square() * feedback.cost()
        count = int(self.salient * w.numel())
        chosen = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
        chosen[saliency.flatten().argsort(descending=True, stable=True)[:count]] = True
        return chosen.view(w.shape)
