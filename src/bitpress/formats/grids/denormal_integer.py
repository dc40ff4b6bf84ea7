"""Integers with denormals: evenly spaced levels, and half a step on either side of zero for weights that would round to it.

    w_hat = (code - zero) * scale      codes 0 .. 2^bits - 3
            -scale / 2, scale / 2      codes 2^bits - 2, 2^bits - 1

Source   Lee et al. 2023, "Enhancing Computation Efficiency in Large Language Models through Weight and Activation Quantization" (dINT):
         two codes are taken from the integer's range for special values of half a step.
Differs  the two codes are our choice, the last ones. Without a stored zero point the levels are -(2^(bits-1) - 1) .. 2^(bits-1) - 2
         times the scale: one more below zero than above, as for integers.

Worked example, 4 bits: -7 .. 6 by codes 0 .. 13, then -0.5 and 0.5.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam

__all__ = ["DenormalInteger"]


@dataclass(frozen=True)
class DenormalInteger:
    bits: int
    zero: bool = False

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise FormatError(f"dint{self.bits}: an integer with denormals needs 3 to 8 bits.")

    @property
    def name(self) -> str:
        return f"dint{self.bits}"

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def num_codes(self) -> int:
        return 1 << self.bits

    @property
    def span(self) -> int:
        return 1

    @property
    def usual_scale(self) -> str:
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        scale = StoredParam("scale", "scale")
        return (scale, StoredParam("zero", "code", bits=self.bits)) if self.zero else (scale,)

    @property
    def steps(self) -> int:
        """Steps from the lowest to the highest integer level; also the code of the highest."""
        return (1 << self.bits) - 3

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the smallest scale that clips nothing; a block of zeros gets 0."""
        low = blocks.amin(-1, keepdim=True).clamp(max=0.0)
        high = blocks.amax(-1, keepdim=True).clamp(min=0.0)
        if not self.zero:
            above = self.steps // 2
            return {"scale": torch.maximum(high / above, -low / (self.steps - above))}
        scale = (high - low) / self.steps
        zero = torch.where(scale > 0, -low / scale, 0.0).round_().clamp_(0, self.steps)
        return {"scale": scale, "zero": zero}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        scale = params["scale"]
        scaled = values / torch.where(scale == 0, 1.0, scale)
        zero = self._zero_of(params)
        codes = scaled.round().add_(zero).clamp_(0, self.steps)
        # Compare distances, not a range around half a step: with zero at an end, the half may be nearest to all values beyond.
        halves = scaled.abs().sub_(0.5).abs_() < (codes - zero).sub_(scaled).abs_()
        half_codes = (scaled > 0).to(torch.uint8).add_(self.steps + 1)
        return torch.where(halves, half_codes, codes.to(torch.uint8))

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        # Codes steps + 1 and steps + 2 are -1/2 and 1/2.
        offset = torch.where(codes > self.steps, self.steps + 1.5, self._zero_of(params))
        return codes.to(torch.float32).sub_(offset).mul_(params["scale"])

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a level."""

    def _zero_of(self, params: Params) -> torch.Tensor | float:
        return params["zero"].to(torch.float32) if self.zero else float(self.steps - self.steps // 2)
