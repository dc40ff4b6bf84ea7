"""decoupleQ's second stage: scales and zero points of a block under fixed integers, with norms.

Source   Guo et al. 2024, "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating Points",
         and its public code (`minimize_block` in `decoupleQ/quant.py`): Adam at 1e-5 with betas of 0.9 and 0.99, 4 passes, on the squared
         error to what the block gave for the same inputs before it was compressed; norms (and biases, by a setting) too.
Differs  200 steps of a falling rate, relative to the mean size of each parameter. A zero point is learned where it is a float (`zerofp16`), as all
         of theirs are; zero points that are codes stay. Betas are Adam's usual ones.
Update   w_hat = (codes - zero) scale, scale and zero by Adam
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitpress.tuning.parameters import Parameters

__all__ = ["DecoupleQ"]


@dataclass(frozen=True, kw_only=True)
class DecoupleQ(Parameters):
    targets: Literal["original", "same"] = "same"

    summary: ClassVar[str] = "scales and float zero points under fixed integers, by what the block gave before"
    paper: ClassVar[str] = "P336"
    serves: ClassVar[tuple[str, ...]] = ("int*",)
