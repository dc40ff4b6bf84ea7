"""Scale stores: a float per scale, a power of two per scale, or small codes under a larger scale that many of them share.

A store rounds a scale to what it can hold before anything is encoded with it, so a quantizer decides by the numbers that a reader decodes.
Values that many scales share (`outer`) are chosen once, from scales that clip nothing; a search for better scales then keeps them fixed.

    name    one scale            shared                                as in
    fp16    float16              -                                     (the default)
    bf16    bfloat16             -
    fp32    float32              -
    e8m0    2^(byte - 127)       -                                     OCP MX; ZeroQuant-FP, constraint M1
    p2row   2^-code, or 0        float32 a row of blocks               ZeroQuant-FP, constraint M2
    fp8     float8 e4m3          float32 a tensor                      NVFP4
    fp8over float8 e4m3          float32 a tensor, which divides it    NVFP4 of compressed-tensors
    s4 s6 s8  unsigned integer   float32 a row of blocks               DGQ, QQQ
    dq      8-bit dynamic map    float32 a 256 scales, float32 offset  bitsandbytes' nested statistics
    s4x16 s6x8 i6x8 i6x16 i8x16  float16 a run of a row's blocks       llama.cpp's K-quants (`formats.scale_runs`)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.double_quantized import DoubleQuantized
from bitpress.formats.layouts.dense import pack, row_bytes, unpack
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scale_store import Outer, ScaleStore, Shapes

__all__ = ["SCALES", "IntegerCodes", "MicroFloat", "Plain", "PowerOfTwo", "RowShifts"]


@dataclass(frozen=True)
class Plain:
    """One float a scale."""

    name: str
    dtype: torch.dtype

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        return {}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        rounded = scale.to(self.dtype).float()
        # A block that is not all zeros keeps at least the smallest scale there is.
        rounded = torch.where((rounded == 0) & (scale > 0), self._smallest, rounded)
        if not bool(torch.isfinite(rounded).all()):
            raise NumericsError(f"a scale is beyond the range of {self.name}; store scales as fp32 or bf16.")
        return rounded

    def beside(self, scale: torch.Tensor, outer: Outer) -> None:
        return None

    @property
    def fine_bits(self) -> int:
        return 8

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        return {"": scale.to(self.dtype).contiguous()}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        return stored[""].float()

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        return {}

    def expected(self, down: int, across: int) -> Shapes:
        return {"": (self.dtype, (down, across))}

    def shared_by_rows(self) -> bool:
        return False

    @property
    def coarseness(self) -> float:
        return 1 / 16  # a sixteenth: float16 has 4 bits left at 2^-20

    @property
    def _smallest(self) -> float:
        return float(torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps)


@dataclass(frozen=True)
class PowerOfTwo:
    """A power of two in a byte, 2^(byte - 127); 255 is not a number in OCP MX and is refused. A scale of 0 becomes 2^-127."""

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        return {}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        return _power_of_two(self._exponent(scale))

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = self._exponent(scale)
        return _power_of_two((nearest - 1).clamp(min=-127)), _power_of_two((nearest + 1).clamp(max=127))

    @property
    def fine_bits(self) -> int:
        return 0

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        return {"": (self._exponent(scale) + 127).to(torch.uint8)}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        if bool((stored[""] == 255).any()):
            raise FormatError("an e8m0 scale is 255 (NaN); the file is damaged.")
        return _power_of_two(stored[""].to(torch.int32) - 127)

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        return {}

    def expected(self, down: int, across: int) -> Shapes:
        return {"": (torch.uint8, (down, across))}

    def shared_by_rows(self) -> bool:
        return False

    @property
    def coarseness(self) -> float:
        return 0.5

    @staticmethod
    def _exponent(scale: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("a scale is not finite.")
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        # Nearest by ratio: round up from sqrt(1/2) of the next power. An exact power has mantissa 0.5 and stays.
        nearest = torch.where(mantissa > math.sqrt(0.5), exponent, exponent - 1)
        nearest = torch.where(scale > 0, nearest, -127)
        if bool((nearest > 127).any()):
            raise NumericsError("a scale is beyond the range of e8m0, 2^127.")
        return nearest.clamp(min=-127).to(torch.int32)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent in float32, exact for denormal numbers too."""
    return torch.ldexp(torch.ones(exponent.shape, dtype=torch.float64, device=exponent.device), exponent).float()


@dataclass(frozen=True)
class MicroFloat:
    """A float8 e4m3 a scale, times one float32 for the tensor: that of the largest scale over 448, the largest float8.

    With `divides`, the float32 is the inverse and the float8 is divided by it: the product with a rounded inverse is another number.
    """

    divides: bool = False
    largest: float = 448.0

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        top = scale.max().reshape(1, 1).float() / self.largest
        top = torch.where(top > 0, top, 1.0)
        return {"tensor": (1 / top).clamp(max=torch.finfo(torch.float32).max) if self.divides else top}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        return self._decoded(self._codes(scale, outer), outer["tensor"])

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor]:
        # The bytes of float8 rise with their numbers; 126 is the largest and 1 the smallest above 0.
        nearest = self._codes(scale, outer).view(torch.uint8).to(torch.int16)
        below, above = (nearest - 1).clamp(min=1), (nearest + 1).clamp(max=126)
        floats = (torch.where(nearest > 0, code, nearest).to(torch.uint8).view(torch.float8_e4m3fn) for code in (below, above))
        low, high = (self._decoded(value, outer["tensor"]) for value in floats)
        return low, high

    @property
    def fine_bits(self) -> int:
        return 4  # a sixteenth of the scale: half a step of 16 levels

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        # Stored as bytes: not every reader of safetensors knows the type, and codes are bytes everywhere else.
        return {"": self._codes(scale, outer).view(torch.uint8).contiguous(), "tensor": outer["tensor"].reshape(1)}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        tensor = stored["tensor"].reshape(1, 1)
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError("the scale of a tensor is a NaN or an infinity.")
        return self._decoded(stored[""].contiguous().view(torch.float8_e4m3fn), tensor)

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        return {"tensor": stored["tensor"].reshape(1, 1)}

    def expected(self, down: int, across: int) -> Shapes:
        return {"": (torch.uint8, (down, across)), "tensor": (torch.float32, (1,))}

    def shared_by_rows(self) -> bool:
        return True

    @property
    def coarseness(self) -> float:
        return 1 / 8

    def _decoded(self, codes: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return codes.float() / tensor if self.divides else codes.float() * tensor

    def _codes(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("a scale is not finite.")
        # A block that is not all zeros keeps at least the smallest scale there is, the smallest float8 above 0.
        lowest = torch.where(scale > 0, 2.0**-9, 0.0)
        scaled = scale * outer["tensor"] if self.divides else scale / outer["tensor"]
        return scaled.clamp_(lowest, torch.tensor(self.largest, device=scale.device)).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class IntegerCodes:
    """An unsigned integer per scale, times one float32 per row of blocks: 4-bit weights inside an 8-bit product."""

    bits: int

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("a scale is not finite.")
        return {"row": scale.amax(-1, keepdim=True) / self.top}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        return self._codes(scale, outer) * outer["row"]

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = self._codes(scale, outer)
        below, above = (torch.where(nearest > 0, (nearest + by).clamp(1, self.top), 0.0) for by in (-1, 1))
        return below * outer["row"], above * outer["row"]

    @property
    def fine_bits(self) -> int:
        return 0  # half a step is half of a small scale

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        codes = self._codes(scale, outer).to(torch.uint8)
        return {"": pack(codes, self.bits), "row": outer["row"].reshape(-1)}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        return unpack(stored[""], self.bits, across).float() * stored["row"][:, None]

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        return {"row": stored["row"][:, None]}

    def expected(self, down: int, across: int) -> Shapes:
        return {"": (torch.uint8, (down, row_bytes(across, self.bits))), "row": (torch.float32, (down,))}

    def shared_by_rows(self) -> bool:
        return False

    @property
    def coarseness(self) -> float:
        return 0.5

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def _codes(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        row = outer["row"]
        codes = (scale / torch.where(row == 0, 1.0, row)).round_()
        # A block that is not all zeros keeps at least the smallest scale there is.
        return torch.where((scale > 0) & (row > 0), codes.clamp(1, self.top), 0.0)


@dataclass(frozen=True)
class RowShifts:
    """A 4-bit code k per scale: 2^-k times one float32 per row of blocks; the last code is a scale of 0.

    Source   Wu et al. 2023, "ZeroQuant-FP", the second constraint on scales: those of a row differ by powers of two, so that a shift
             turns 4-bit weights into 8-bit numbers.
    Differs  the nearest power by ratio; scales more than 2^14 below their row's largest are raised to that limit.
    """

    bits: int = 4

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError("a scale is not finite.")
        return {"row": scale.amax(-1, keepdim=True).float()}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        return self._decoded(self._codes(scale, outer), outer["row"])

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = self._codes(scale, outer)
        below, above = (
            torch.where(nearest < self._none, (nearest + by).clamp(0, self._none - 1), self._none) for by in (1, -1)
        )
        return self._decoded(below, outer["row"]), self._decoded(above, outer["row"])

    @property
    def fine_bits(self) -> int:
        return 0

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        codes = self._codes(scale, outer).to(torch.uint8)
        return {"": pack(codes, self.bits), "row": outer["row"].reshape(-1)}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        return self._decoded(unpack(stored[""], self.bits, across), stored["row"][:, None])

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        return {"row": stored["row"][:, None]}

    def expected(self, down: int, across: int) -> Shapes:
        return {"": (torch.uint8, (down, row_bytes(across, self.bits))), "row": (torch.float32, (down,))}

    def shared_by_rows(self) -> bool:
        return False

    @property
    def coarseness(self) -> float:
        return 0.5

    @property
    def _none(self) -> int:
        """The code of a scale of 0."""
        return (1 << self.bits) - 1

    def _codes(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        row = outer["row"]
        shifts = torch.log2(row / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, self._none - 1)
        return torch.where((scale > 0) & (row > 0), shifts, self._none)

    def _decoded(self, codes: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        scale = row * _power_of_two(-codes.to(torch.int32))
        # A NaN row factor must be found even if no scale uses it.
        return torch.where((codes == self._none) & torch.isfinite(row), 0.0, scale)


SCALES: dict[str, ScaleStore] = {
    "fp16": Plain("fp16", torch.float16),
    "bf16": Plain("bf16", torch.bfloat16),
    "fp32": Plain("fp32", torch.float32),
    "e8m0": PowerOfTwo(),
    "fp8": MicroFloat(),
    "fp8over": MicroFloat(divides=True),
    "s4": IntegerCodes(4),
    "s6": IntegerCodes(6),
    "s8": IntegerCodes(8),
    "s4x16": RunCodes(4, 16),
    "s6x8": RunCodes(6, 8),
    "i6x8": RunCodes(6, 8, signed=True),
    "i6x16": RunCodes(6, 16, signed=True),
    "i8x16": RunCodes(8, 16, signed=True),
    "p2row": RowShifts(),
    "dq": DoubleQuantized(),
}
