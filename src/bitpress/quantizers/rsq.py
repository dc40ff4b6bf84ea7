"""RSQ: rotate, weigh tokens by the attention that they get, then round as GPTQ does.

Source   Sung et al. 2025, "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs"; attention concentration, weights
         from 1 to 3 with a mean of 1 in each text, for all layers of the block, as in the authors' public code.
Differs  the rotation is the transform `hadamard`, a change of each weight's own basis, where the paper rotates the network;
         a layer's error is reported on all tokens alike.
Needs    gram, attention_gram [in, in] float32.     Cost  that of GPTQ.
Update   as GPTQ's, with attention_gram = sum of r_t x_t x_t' / tokens in the place of the gram
Fails    as GPTQ. If tokens have no weights (experts), the plain gram is used: a named fallback.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.formats import Format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.mechanisms.error_feedback import Order
from bitpress.quantizers.mechanisms.running_groups import Groups
from bitpress.quantizers.quantizer import Outcome, Quantizer

__all__ = ["RSQ"]


@dataclass(frozen=True)
class RSQ(Quantizer):
    damp: float = 0.01
    order: Order = "activation"
    groups: Groups = "static"
    clip: Literal["minmax", "mse"] = "mse"
    steps: int = 20
    smallest: float = 0.5
    lazy: int = 128
    damp_limit: float = 10.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "attention_gram"})
    transforms: ClassVar[tuple[str, ...]] = ("hadamard",)
    summary: ClassVar[str] = "error feedback by the tokens that attention is drawn to, after a rotation"
    paper: ClassVar[str] = "P196"
    bits: ClassVar[tuple[float, float]] = (2, 4)
    native_loops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._rounder()

    @property
    def keeps_map(self) -> bool:
        return self._rounder().keeps_map

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        stats = stats or Stats(0)
        gram = stats.need_gram("rsq")
        weighted = stats.attention_gram
        outcome = self._rounder().quantize(w, replace(stats, gram=gram if weighted is None else weighted), fmt)
        if weighted is not None:
            return outcome
        return replace(
            outcome, fallbacks=(*outcome.fallbacks, "the attention of the tokens is unknown; all tokens weigh the same")
        )

    def _rounder(self) -> GPTQ:
        return GPTQ(
            damp=self.damp,
            order=self.order,
            groups=self.groups,
            clip=self.clip,
            steps=self.steps,
            smallest=self.smallest,
            lazy=self.lazy,
            damp_limit=self.damp_limit,
        )
