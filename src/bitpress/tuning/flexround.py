"""FlexRound: a weight is divided by a learned factor of its own, and of its row, before it is rounded.

Source   Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization". LRQ: Lee et al. 2024,
         "LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank Weight-Scaling Matrices". Their public code
         (`quant/UniformAffineQuantizer.py`, `scripts/`): all factors and the scale are learned as exponents, zero points stay; 5,000 steps of 2
         texts at 2.5e-3 (FlexRound) and 6e-4 (LRQ) for 3 bits of a model of 7B.
Differs  factors multiply what encodes to the closed form's codes, in units of whose scales they begin; 200 steps of 8 texts. Blocks may be groups.
         Rank 32 with U of variance 1 / rank, where the authors take rank 1,024 (2,048 from 8,192 channels on), a uniform U, and full factors
         for weights that are not square. Inputs are not mixed with the uncompressed model's (their `input_prob`).
Update   w_hat = s (clamp(round(w / (s S)) + z, 0, top) - z),  S = exp(V + r), or exp(L U + r + c) of low rank, of vectors r of rows, c of columns
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import UsageError
from bitpress.formats.grids.grid import Params
from bitpress.tuning.learned import Leaf, LearnedCodes, Start
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["LRQ", "FlexRound"]


@dataclass(frozen=True, kw_only=True)
class FlexRound(Tuning):
    rate: float | None = 2e-3
    schedule: ScheduleName = "cosine"
    scales: bool = True

    summary: ClassVar[str] = "every weight divided by a factor of its own before it is rounded"
    paper: ClassVar[str] = "P170"
    serves: ClassVar[tuple[str, ...]] = ("int*",)

    def begin(self, start: Start) -> LearnedCodes:
        return _Divided(start, self.scales, None, self.seed)


@dataclass(frozen=True, kw_only=True)
class LRQ(Tuning):
    rate: float | None = 2e-3
    schedule: ScheduleName = "cosine"
    scales: bool = True
    rank: int = 32

    summary: ClassVar[str] = "weights divided by the exponent of a low-rank matrix before they are rounded"
    paper: ClassVar[str] = "P158"
    serves: ClassVar[tuple[str, ...]] = ("int*",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"rank={self.rank}: it is 1 or more.")

    def begin(self, start: Start) -> LearnedCodes:
        return _Divided(start, self.scales, self.rank, self.seed)


class _Divided(LearnedCodes):
    def __init__(self, start: Start, scales: bool, rank: int | None, seed: int) -> None:
        super().__init__(start)
        rows, cols = self.base.shape
        like = self.base
        self.rows = like.new_zeros(rows, 1).requires_grad_()
        if rank is None:
            self.factors = [torch.zeros_like(like, requires_grad=True)]
            self.columns = None
        else:
            self.columns = like.new_zeros(1, cols).requires_grad_()
            rank = min(rank, rows, cols)
            drawn = torch.randn(rank, cols, generator=torch.Generator().manual_seed(seed)) / rank**0.5
            self.factors = [like.new_zeros(rows, rank).requires_grad_(), drawn.to(like.device).requires_grad_()]
        self.scale = torch.zeros_like(self.given["scale"], requires_grad=True) if scales else None

    def leaves(self) -> list[Leaf]:
        own = [Leaf(t) for t in (*self.factors, self.rows, self.columns) if t is not None]
        return own if self.scale is None else [*own, Leaf(self.scale)]

    def params(self) -> Params:
        return self.given if self.scale is None else {**self.given, "scale": self.given["scale"] * self.scale.exp()}

    def values(self, params: Params) -> Float[torch.Tensor, "out in"]:
        factors = self.factors
        exponent = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        exponent = exponent + self.rows
        return self.base * (-(exponent if self.columns is None else exponent + self.columns)).exp()
