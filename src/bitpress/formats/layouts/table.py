"""Layouts: how a row of codes becomes bytes. Each is named, exact, and works on any number of codes.

    dense    any width    the bits side by side (see formats.dense)
    base3    3^k levels   five digits of 0 to 2 in a byte: d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4; 1.6 bits a digit, k digits a code
    split    6 bits       the low four bits of all codes, then the high two bits of all codes, each dense: FP6 as 4 + 2
    nested   8 bits       bits 7 and 6 of all codes, then bits 5 and 4, then bits 3 to 0, each dense: 2 and 4 bits inside 8

Worked example: the codes 2, 0, 1, 2, 2 of three levels are the byte 2 + 9 + 54 + 162 = 227.

    >>> import torch
    >>> row = LAYOUTS["base3"].pack(torch.tensor([[2, 0, 1, 2, 2, 1]], dtype=torch.uint8), bits=2)
    >>> row.tolist()
    [[227, 1]]
    >>> LAYOUTS["base3"].unpack(row, bits=2, count=6).tolist()
    [[2, 0, 1, 2, 2, 1]]
"""

from typing import Protocol

import torch
from jaxtyping import Integer as Int
from jaxtyping import UInt8

from bitpress.errors import FormatError
from bitpress.formats.layouts import dense as dense

__all__ = ["LAYOUTS", "Base3", "Dense", "Layout", "Nested", "Split"]


class Layout(Protocol):
    def refuses(self, bits: int, num_codes: int) -> str | None:
        """Return why this layout cannot hold codes of this kind, or None if it can."""
        ...

    def row_bytes(self, count: int, bits: int) -> int:
        """Bytes that a row of `count` codes takes."""
        ...

    def pack(self, codes: Int[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]: ...

    def unpack(self, packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> Int[torch.Tensor, "rows count"]:
        """Return the codes. Raises FormatError for invalid bytes."""
        ...


class Dense:
    """Codes of any width side by side, the least significant bit first."""

    def refuses(self, bits: int, num_codes: int) -> str | None:
        return None

    def row_bytes(self, count: int, bits: int) -> int:
        return dense.row_bytes(count, bits)

    def pack(self, codes: Int[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
        return dense.pack(codes, bits)

    def unpack(self, packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> Int[torch.Tensor, "rows count"]:
        return dense.unpack(packed, bits, count)


# Digits of a code by its bits: 3, 9, 27 or 81 levels.
_TRITS = {2: 1, 4: 2, 5: 3, 7: 4}


class Base3:
    """Five digits of three levels in a byte, the first one least significant; a code of 9 levels is two digits, the lower one first."""

    def refuses(self, bits: int, num_codes: int) -> str | None:
        trits = _TRITS.get(bits)
        return None if trits and num_codes == 3**trits else "base3 is for codes of 3, 9, 27 or 81 levels"

    def row_bytes(self, count: int, bits: int) -> int:
        return -(-count * _TRITS[bits] // 5)

    def pack(self, codes: Int[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
        digits = torch.stack([codes // 3**i % 3 for i in range(_TRITS[bits])], dim=-1).flatten(1) if bits > 2 else codes
        fields = torch.nn.functional.pad(digits, (0, -digits.shape[1] % 5)).view(codes.shape[0], -1, 5)
        joined = fields[..., 4].clone()
        for i in (3, 2, 1, 0):
            joined = joined * 3 + fields[..., i]
        return joined

    def unpack(self, packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> Int[torch.Tensor, "rows count"]:
        if bool((packed > 242).any()):
            raise FormatError("a byte above 242 is not five digits of three levels; the file is damaged.")
        # Every byte's five digits from a table of 243 rows: one read instead of five divisions.
        values = torch.arange(243, device=packed.device)
        table = torch.stack([values.div(3**i, rounding_mode="floor") % 3 for i in range(5)], dim=-1).to(torch.uint8)
        digits = table[packed.int()].reshape(packed.shape[0], -1)[:, : count * _TRITS[bits]]
        places = torch.tensor([3**i for i in range(_TRITS[bits])], dtype=torch.uint8, device=packed.device)
        return (digits.reshape(len(packed), count, -1) * places).sum(-1, dtype=torch.uint8) if bits > 2 else digits.contiguous()


class Split:
    """6-bit codes as a plane of nibbles and a plane of bit pairs, so that a kernel reads two aligned streams.

    Source   Wu et al. 2023, "ZeroQuant(4+2)": an FP6 weight split into 4 and 2 bits.
    """

    def refuses(self, bits: int, num_codes: int) -> str | None:
        return None if bits == 6 else "split is for codes of 6 bits"

    def row_bytes(self, count: int, bits: int) -> int:
        return dense.row_bytes(count, 4) + dense.row_bytes(count, 2)

    def pack(self, codes: Int[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
        return torch.cat([dense.pack(codes & 15, 4), dense.pack(codes >> 4, 2)], dim=-1)

    def unpack(self, packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> Int[torch.Tensor, "rows count"]:
        nibbles = dense.row_bytes(count, 4)
        return dense.unpack(packed[:, :nibbles], 4, count) | dense.unpack(packed[:, nibbles:], 2, count) << 4


class Nested:
    """8-bit codes as two planes of bit pairs and one of nibbles, so that a reader of 2 or 4 bits stops early.

    Source   "Nearly Lossless Adaptive Bit Switching": one stored weight serves several widths. See formats.nested.
    """

    def refuses(self, bits: int, num_codes: int) -> str | None:
        return None if bits == 8 else "nested is for codes of 8 bits"

    def row_bytes(self, count: int, bits: int) -> int:
        return 2 * dense.row_bytes(count, 2) + dense.row_bytes(count, 4)

    def pack(self, codes: Int[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
        return torch.cat([dense.pack(codes >> 6, 2), dense.pack(codes >> 4 & 3, 2), dense.pack(codes & 15, 4)], dim=-1)

    def unpack(self, packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> Int[torch.Tensor, "rows count"]:
        pairs = dense.row_bytes(count, 2)
        high, middle, low = packed[:, :pairs], packed[:, pairs : 2 * pairs], packed[:, 2 * pairs :]
        return dense.unpack(high, 2, count) << 6 | dense.unpack(middle, 2, count) << 4 | dense.unpack(low, 4, count)


LAYOUTS: dict[str, Layout] = {"dense": Dense(), "base3": Base3(), "split": Split(), "nested": Nested()}
