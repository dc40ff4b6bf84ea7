"""Integers: equally spaced levels, symmetric around zero or with a zero point.

    w_hat = (codes - zero) * scale          codes 0 .. 2^bits - 1, unsigned; zero in code units

Without a stored zero point, zero is the constant 2^(bits-1): the levels are -2^(bits-1) .. 2^(bits-1) - 1 times the scale.
With one, zero is an integer code of the same width, so the value 0.0 is always a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native
from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scale_store import Outer, ScaleStore
from bitpress.formats.scales import IntegerCodes, Plain

__all__ = ["Integer"]


@dataclass(frozen=True)
class Integer:
    bits: int
    zero: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"int{self.bits}: an integer format needs 1 to 8 bits.")
        if self.bits == 1 and not self.zero:
            raise FormatError("int1: one bit without a zero point has no positive level; use int1-...-zero or binary.")

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
        scale = StoredParam("scale", "scale")
        return (scale, StoredParam("zero", "code", bits=self.bits)) if self.zero else (scale,)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the smallest scale that clips nothing (`importance` is ignored).

        A block of zeros gets scale 0, which decodes to exact zeros.
        """
        low = blocks.amin(-1, keepdim=True).clamp(max=0.0)
        high = blocks.amax(-1, keepdim=True).clamp(min=0.0)
        if not self.zero:
            half = 1 << (self.bits - 1)
            return {"scale": torch.maximum(high / (half - 1), -low / half)}
        scale = (high - low) / self.top
        zero = torch.where(scale > 0, -low / scale, 0.0).round_().clamp_(0, self.top)
        return {"scale": scale, "zero": zero}

    def search(
        self,
        blocks: Float[torch.Tensor, "blocks n"],
        importance: Float[torch.Tensor, "blocks n"] | None,
        shrink: Sequence[float],
        store: ScaleStore,
        outer: Outer,
    ) -> Params | None:
        """See `OwnSearch`."""
        kept: torch.dtype | native.Steps | None = store.dtype if isinstance(store, Plain) else None
        if isinstance(store, IntegerCodes):
            kept = native.Steps(outer["row"], store.top)
        if isinstance(store, RunCodes):
            kept = native.Steps(outer["run"], store.top)
        if kept is None or blocks.device.type != "cpu" or not native.available():
            return None
        scale, zero, good = native.search_ranges(blocks, importance, shrink, self.top, with_zero=self.zero, kept=kept)
        if not good:
            return None
        return {"scale": scale} if zero is None else {"scale": scale, "zero": zero}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... n"]:
        scale = params["scale"]
        if native.serves(values, scale):
            return native.encode_affine(values, scale, self.zero_of(params), self.top)
        # A scale of 0 marks a block of zeros; dividing by 1 there keeps the codes finite and decode gives 0 anyway.
        codes = values / torch.where(scale == 0, 1.0, scale)
        codes = codes.round_().add_(self.zero_of(params)).clamp_(0, self.top)
        return codes.to(torch.uint8)

    def decode(self, codes: Int[torch.Tensor, "... n"], params: Params) -> Float[torch.Tensor, "... n"]:
        if native.serves(codes, params["scale"]):
            return native.decode_affine(codes, params["scale"], self.zero_of(params))
        return (codes.to(torch.float32) - self.zero_of(params)) * params["scale"]

    def zero_of(self, params: Params) -> torch.Tensor | float:
        return params["zero"].to(torch.float32) if self.zero else float(1 << (self.bits - 1))

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a level."""
