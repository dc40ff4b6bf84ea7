"""Scales in two levels: small integers under a float16 that the scales of a run of blocks of a row share, as in llama.cpp's K-quants.

    name    one scale                   as in
    s4x16   4 bits, unsigned            Q2_K
    s6x8    6 bits, unsigned            Q4_K, Q5_K
    i6x8    6 bits, -32 to 31           IQ4_XS
    i6x16   6 bits, -32 to 31           Q3_K
    i8x16   8 bits, -128 to 127         Q6_K

A scale is its integer times the float16 of its run: `sNxR` and `iNxR` have N bits and runs of R scales. Rows hold whole runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.layouts.dense import pack, row_bytes, unpack
from bitpress.formats.scale_store import Outer, Shapes

__all__ = ["RunCodes"]


@dataclass(frozen=True)
class RunCodes:
    """An integer per scale, times one float16 for every run of scales of a row: the super-blocks of llama.cpp.

    A scale that is fitted here is never below 0; one in a file of another tool may be, under a signed store.
    """

    bits: int
    run: int
    signed: bool = False

    def check(self, name: str, width: int, across: int) -> None:
        """Raise FormatError unless `across` blocks of a row of `width` weights, in the format `name`, are whole runs."""
        if across % self.run:
            raise FormatError(
                f"in_features={width} is not a multiple of {width // across * self.run}, the {self.run} blocks that share a float16 "
                f"in {name}; use another store of scales, or a format without one such as q5_0 or q4_0."
            )

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("a scale is not finite.")
        size = torch.nn.functional.pad(scale.abs() if self.signed else scale.clamp(min=0), (0, -scale.shape[1] % self.run))
        step = size.view(len(scale), -1, self.run).amax(-1) / self.top
        kept = step.to(torch.float16).float()
        # A run that is not all zeros keeps at least the smallest step there is.
        kept = torch.where((kept == 0) & (step > 0), _SMALLEST, kept)
        if not bool(torch.isfinite(kept).all()):
            raise NumericsError("a scale is beyond the range of float16 steps; store scales as fp32 or bf16.")
        return {"run": kept.repeat_interleave(self.run, 1)[:, : scale.shape[1]].contiguous()}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        return self._codes(scale, outer) * outer["run"]

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = self._codes(scale, outer)
        below, above = (
            torch.where(
                nearest > 0,
                (nearest + by).clamp(1, self.top),
                torch.where(nearest < 0, (nearest + by).clamp(-self.offset, -1), 0.0),
            )
            for by in (-1, 1)
        )
        return below * outer["run"], above * outer["run"]

    @property
    def fine_bits(self) -> int:
        return 0  # half a step is half of a small scale

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        codes = (self._codes(scale, outer) + self.offset).to(torch.uint8)
        return {"": pack(codes, self.bits), "run": outer["run"][:, :: self.run].to(torch.float16).contiguous()}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        return (unpack(stored[""], self.bits, across).float() - self.offset) * self.stored_outer(stored, across)["run"]

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        return {"run": stored["run"].float().repeat_interleave(self.run, 1)[:, :across]}

    def expected(self, down: int, across: int) -> Shapes:
        return {
            "": (torch.uint8, (down, row_bytes(across, self.bits))),
            "run": (torch.float16, (down, -(-across // self.run))),
        }

    def shared_by_rows(self) -> bool:
        return False

    @property
    def coarseness(self) -> float:
        return 0.5

    @property
    def offset(self) -> int:
        """What is added to a signed integer before it is stored."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1 - self.offset

    def _codes(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        step = outer["run"]
        codes = (scale / torch.where(step == 0, 1.0, step)).round_()
        # A block that is not all zeros keeps at least the smallest scale there is.
        below = torch.where((scale < 0) & (step > 0), codes.clamp(-self.offset, -1), 0.0) if self.signed else 0.0
        return torch.where((scale > 0) & (step > 0), codes.clamp(1, self.top), below)


_SMALLEST = 2.0**-24
