"""The dense layout: codes of 1 to 24 bits side by side, least significant bit first, no padding inside a row.

    code i of a row occupies the bits  [i * bits, (i + 1) * bits)  of that row's bytes
    bit  b of a row is                 (byte[b // 8] >> (b % 8)) & 1
    a row of n codes takes             ceil(n * bits / 8) bytes; the unused high bits of its last byte are 0

Worked example: the 3-bit codes 1, 2, 3, 4, 5 are the bit string 101 100 011 010 001 read from the right.

    >>> import torch
    >>> row = pack(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8), bits=3)
    >>> [f"{byte:08b}" for byte in row[0].tolist()]
    ['11010001', '01011000']
    >>> unpack(row, bits=3, count=5).tolist()
    [[1, 2, 3, 4, 5]]

Codes are uint8 up to 8 bits and int32 beyond.
"""

import torch
from jaxtyping import Integer as Int
from jaxtyping import UInt8

from bitpress import native

__all__ = ["code_dtype", "pack", "row_bytes", "unpack"]


def code_dtype(bits: int) -> torch.dtype:
    """Return the type of unpacked codes of this width."""
    return torch.uint8 if bits <= 8 else torch.int32


def row_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return (count * bits + 7) // 8


def pack(codes: Int[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
    """Pack codes, each below 2^bits, row by row."""
    rows, count = codes.shape
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    if bits > 8:
        return _pack_wide(codes, bits)
    if codes.device.type == "cpu" and native.available():
        return native.pack_dense(codes, bits)
    if 8 % bits == 0:
        fields = torch.nn.functional.pad(codes, (0, -count % (8 // bits))).view(rows, -1, 8 // bits)
        joined = fields[..., 0].clone()
        for i in range(1, 8 // bits):
            joined |= fields[..., i] << (bits * i)
        return joined
    # Eight codes fill exactly `bits` bytes, so one 64-bit word holds them at any width.
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).view(rows, -1, 8)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= padded[..., i].to(torch.int64) << (bits * i)
    packed = torch.stack([(words >> (8 * b)) & 0xFF for b in range(bits)], dim=-1).to(torch.uint8)
    return packed.reshape(rows, -1)[:, : row_bytes(count, bits)].contiguous()


def unpack(packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> Int[torch.Tensor, "rows count"]:
    """Return the first `count` codes of every row."""
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :count].contiguous()
    if bits > 8:
        return _unpack_wide(packed, bits, count)
    if packed.device.type == "cpu" and native.available():
        return native.unpack_dense(packed, bits, count)
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        fields = torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)
        return fields.reshape(rows, -1)[:, :count].contiguous()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=packed.device)
    for b in range(bits):
        words |= padded[..., b].to(torch.int64) << (8 * b)
    fields = torch.stack([(words >> (bits * i)) & mask for i in range(8)], dim=-1).to(torch.uint8)
    return fields.reshape(rows, -1)[:, :count].contiguous()


def _pack_wide(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, count = codes.shape
    each = (codes[..., None] >> torch.arange(bits, dtype=torch.int32, device=codes.device)).bitwise_and_(1).to(torch.uint8)
    padded = torch.nn.functional.pad(each.reshape(rows, -1), (0, -count * bits % 8)).view(rows, -1, 8)
    joined = torch.zeros(padded.shape[:2], dtype=torch.uint8, device=codes.device)
    for i in range(8):
        joined |= padded[..., i] << i
    return joined


def _unpack_wide(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    rows = packed.shape[0]
    each = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    fields = each.reshape(rows, -1)[:, : count * bits].reshape(rows, count, bits)
    codes = torch.zeros(rows, count, dtype=torch.int32, device=packed.device)
    for i in range(bits):
        codes |= fields[..., i].to(torch.int32) << i
    return codes
