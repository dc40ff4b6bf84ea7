"""LoftQ and LQ-LoRA: codes and a low-rank term found in turn, each for what the other leaves of the weight.

Source   LoftQ: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", and its public code
         (`quantize_save.py`, `glue/utils.py`): codes first, 1 round by default and 5 in its example. LQ-LoRA: Guo et al. 2023, "LQ-LoRA: Low-rank Plus Quantized Matrix
         Decomposition for Efficient Language Model Finetuning", and its public code (`models/lq_utils.py`): factors first, rounds until the
         error no longer falls, 100 at most.
Differs  the rounds end with the factors and the quantizer of the recipe chooses the last codes beside them; rounding before is to nearest. LoftQ
         keeps what its last round gives; LQ-LoRA the round of the least error, where the authors keep the one after it. Its weighted
         decomposition and its program for the widths are left out; whole decompositions stand for random ones. Both papers train the
         factors then: the tuning `low-rank`.
Needs    nothing.       Cost  O(rounds * out * in * min(out, in)) time; rank * (out + in) numbers stored.
Update   q = Q(w - a b),  a b = the nearest matrix of the rank to w - q,  from a b = 0 (LoftQ) or q = 0 (LQ-LoRA)
Fails    NumericsError when the weight is not finite or a factor is beyond the range of its type.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.corrections.factors import check_factors, factor_bytes, leading_part
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, LowRank

__all__ = ["LQLoRA", "LoftQ"]


@dataclass(frozen=True)
class LoftQ:
    """`dtype` of the factors: fp16, bf16 or a number format such as int8-row. `rounds`: of codes and factors."""

    rank: int = 32
    dtype: str = "fp16"
    rounds: int = 5

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "a low-rank term found in turn with the codes"
    paper: ClassVar[str] = "P277"

    def __post_init__(self) -> None:
        _check(self.rank, self.dtype, self.rounds)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> LowRank:
        rest = w = w.float()
        term: LowRank | None = None
        for _ in range(self.rounds):
            term = _factors(w - _rounded(rest, fmt), self.rank, self.dtype)
            rest = w - term.dequantize()
        assert term is not None
        return term

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> None:
        return None


@dataclass(frozen=True)
class LQLoRA:
    """`dtype` of the factors as for `loftq`. `rounds`: of factors and codes, at most."""

    rank: int = 32
    dtype: str = "fp16"
    rounds: int = 100

    needs: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "a low-rank term found in turn with the codes, factors first, until the error no longer falls"
    paper: ClassVar[str] = "P194"

    def __post_init__(self) -> None:
        _check(self.rank, self.dtype, self.rounds)

    def nbytes(self, shape: tuple[int, int], parts: int = 1) -> int:
        return factor_bytes(self.rank, self.dtype, shape, parts)

    def split(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> LowRank:
        w = w.float()
        best = term = _factors(w, self.rank, self.dtype)
        least, size = math.inf, float(w.abs().max()) or 1.0
        for _ in range(self.rounds):
            rest = w - term.dequantize()
            codes = _rounded(rest, fmt)
            error = float(((rest - codes) / size).square().sum())
            if not error < least:
                break
            best, least = term, error
            term = _factors(w - codes, self.rank, self.dtype)
        return best

    def repair(self, w: Float[torch.Tensor, "out in"], weight: CompressedWeight, stats: Stats | None) -> None:
        return None


def _check(rank: int, dtype: str, rounds: int) -> None:
    check_factors(rank, dtype)
    if rounds < 1:
        raise UsageError(f"rounds={rounds}: must be 1 or more.")


def _factors(m: Float[torch.Tensor, "out in"], rank: int, dtype: str) -> LowRank:
    a, b = leading_part(m, rank)
    return LowRank.store(a, b, dtype)


def _rounded(w: Float[torch.Tensor, "out in"], fmt: Format) -> Float[torch.Tensor, "out in"]:
    params = fmt.fit(w)
    return fmt.decode(fmt.encode(w, params), params)
