"""Integers with a zero point between codes: equally spaced levels that begin anywhere, as a float says.

    w_hat = (codes - zero) * scale          codes 0 .. 2^bits - 1; zero in code units, not rounded to a code

Source   Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", whose zero points are such floats.
Stored   zero points are float16, or float32 where `zero_bits` is 32, which files of HQQ in bfloat16 or float32 may need.
Differs  the range of a block includes 0, so that no zero point is far from the codes; 0.0 itself is a level only by chance.

Worked example, 2 bits, scale 1, zero 1.5:

    >>> import torch
    >>> params = {"scale": torch.ones(1, 1), "zero": torch.full((1, 1), 1.5)}
    >>> FloatZero(2).decode(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), params).tolist()
    [[-1.5, -0.5, 0.5, 1.5]]
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam

__all__ = ["FloatZero"]


@dataclass(frozen=True)
class FloatZero:
    bits: int
    zero_bits: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.zero_bits not in (16, 32):
            raise FormatError(
                f"int{self.bits}: zero points between codes are floats of 16 or 32 bits, of integers of 1 to 8 bits."
            )

    @property
    def name(self) -> str:
        return f"int{self.bits}"

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
        return StoredParam("scale", "scale"), StoredParam("zero", "value", bits=self.zero_bits)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the smallest scale that clips nothing; a block of zeros gets 0 (`importance` is ignored)."""
        low = blocks.amin(-1, keepdim=True).clamp(max=0.0)
        high = blocks.amax(-1, keepdim=True).clamp(min=0.0)
        scale = (high - low) / (self.num_codes - 1)
        return {"scale": scale, "zero": torch.where(scale > 0, -low / scale, 0.0)}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        # A scale of 0 marks a block of zeros; dividing by 1 there keeps the codes finite and decode gives 0 anyway.
        codes = values / torch.where(params["scale"] == 0, 1.0, params["scale"])
        return codes.add_(params["zero"]).round_().clamp_(0, self.num_codes - 1).to(torch.uint8)

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        return (codes.to(torch.float32) - params["zero"]) * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a level."""
