"""Integers with a minimum: equally spaced levels from any number on.

    w_hat = code * scale - min              codes 0 .. 2^bits - 1, unsigned

`min` is stored as the scale is. The range that is fitted here includes 0, so that it is never below 0, which stores of unsigned integers need; in a
file of another tool, under a store of plain floats, it may have either sign (the minimum of Q4_1 and the bias of MLX are `-min`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam

__all__ = ["MinimumInteger"]


@dataclass(frozen=True)
class MinimumInteger:
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"int{self.bits}: an integer format needs 1 to 8 bits.")

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
        return StoredParam("scale", "scale"), StoredParam("min", "scale")

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the smallest scale and minimum that clip nothing (`importance` is ignored)."""
        low = blocks.amin(-1, keepdim=True).clamp(max=0.0)
        high = blocks.amax(-1, keepdim=True).clamp(min=0.0)
        top = self.num_codes - 1
        return {"scale": high / top - low / top, "min": -low}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        scale = params["scale"]
        # Where the scale is 0 every code is the minimum; dividing by 1 keeps the codes finite.
        codes = (values + params["min"]).div_(torch.where(scale == 0, 1.0, scale))
        return codes.round_().clamp_(0, self.num_codes - 1).to(torch.uint8)

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        return codes.to(torch.float32) * params["scale"] - params["min"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a level."""
