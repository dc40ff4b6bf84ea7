"""GPTAQ: GPTQ that aims at the layer's outputs in the uncompressed model instead of those for its own inputs.

Source   Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration"; the update and the
         strength of 0.25 as in the authors' public code.
Differs  the asymmetry term uses the original weights, not those changed by feedback, so that it becomes a shift before a plain
         pass; target="whole" shifts every column by the whole term, the least-squares solution of the paper's objective, where
         the paper shifts a column by the part of the columns before it; a block is measured once, so that the asymmetry is
         that of the block's input.
Needs    gram, cross [in, in] float32.     Cost  that of GPTQ and O(out * in^2 + in^3) time, O(in^2) memory.
Update   w += strength * w @ P,  P = triu(cross @ U', 1) @ U  or  cross @ U' @ U;  U and then each column as in GPTQ
Fails    as GPTQ. If cross was not measured (experts), or if the shift is as large as the weight, the shift is left out: a named
         fallback.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import Format, Packed
from bitpress.quantizers.mechanisms.error_feedback import Feedback, Order, check_feedback, prepare
from bitpress.quantizers.mechanisms.running_groups import Groups, arrange, check_groups, moves_columns
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["GPTAQ"]


@dataclass(frozen=True)
class GPTAQ(Quantizer):
    strength: float = 0.25
    target: Literal["order", "whole"] = "order"
    damp: float = 0.01
    order: Order = "activation"
    groups: Groups = "static"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "cross"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "error feedback towards the outputs of the uncompressed model"
    paper: ClassVar[str] = "yardstick: GPTAQ"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shrink_ratios(self.clip, self.steps, self.smallest)
        check_feedback(self.order, self.damp, self.damp_limit, self.lazy)
        check_groups(self.groups)
        if self.target not in ("order", "whole"):
            raise UsageError(f"target={self.target!r}: must be 'order' or 'whole'.")
        if not 0 <= self.strength <= 1:
            raise UsageError(f"strength={self.strength}: must be between 0 and 1.")

    @property
    def keeps_map(self) -> bool:
        return moves_columns(self.groups, self.order)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        stats = stats or Stats(0)
        gram = stats.need_gram("gptaq")
        feedback = prepare(gram, self.order, fmt.grid.span, self.damp, self.damp_limit)
        fallbacks = list(feedback.fallbacks)
        w = w.float()
        change = 0.0
        if stats.cross is None:
            fallbacks.append(
                "the inputs in the uncompressed model are unknown; the GPTAQ correction was skipped for this layer"
            )
        elif feedback.factor is not None:
            shift = self._shift(w, stats.cross, feedback, feedback.factor)
            change = float(shift.norm() / w.norm().clamp(min=torch.finfo(torch.float32).tiny))
            if change < 1:
                w = w + shift
            else:
                fallbacks.append("the GPTAQ correction is larger than the weight; it was skipped for this layer")
        arranged = arrange(w, gram, feedback, fmt, self.groups, self.order)
        columns = arranged.columns(fmt, shrink_ratios(self.clip, self.steps, self.smallest), lazy=self.lazy)
        weight = arranged.restored(Packed.pack(fmt, columns.codes, columns.params))
        return Outcome(weight, tuple(fallbacks), {"damp": feedback.damp or 0.0, "shift": change})

    def _shift(
        self,
        w: Float[torch.Tensor, "out in"],
        cross: Float[torch.Tensor, "in in"],
        feedback: Feedback,
        factor: Float[torch.Tensor, "in in"],
    ) -> Float[torch.Tensor, "out in"]:
        order = feedback.order
        # A channel that was always zero here has no part in the error.
        cross = torch.where(feedback.dead, 0.0, cross)[order][:, order]
        asked = cross @ factor.T
        if self.target == "order":
            asked = asked.triu(1)
        shift = torch.zeros_like(w)
        shift[:, order] = self.strength * (w[:, order] @ asked @ factor)
        return shift
