"""The dense layout: codes of 1 to 8 bits side by side, least significant bit first, no padding inside a row.

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
"""

import torch
from jaxtyping import UInt8

__all__ = ["pack", "row_bytes", "unpack"]


def row_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return (count * bits + 7) // 8


def pack(codes: UInt8[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
    """Pack codes, each below 2^bits, row by row."""
    rows, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    if 8 % bits == 0:
        fields = torch.nn.functional.pad(codes, (0, -count % (8 // bits))).view(rows, -1, 8 // bits)
        joined = fields[..., 0].clone()
        for i in range(1, 8 // bits):
            joined |= fields[..., i] << (bits * i)
        return joined
    # Eight codes fill exactly `bits` bytes, so one 64-bit word carries them whatever the width.
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).view(rows, -1, 8)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for i in range(8):
        words |= padded[..., i].to(torch.int64) << (bits * i)
    packed = torch.stack([(words >> (8 * b)) & 0xFF for b in range(bits)], dim=-1).to(torch.uint8)
    return packed.reshape(rows, -1)[:, : row_bytes(count, bits)].contiguous()


def unpack(packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> UInt8[torch.Tensor, "rows count"]:
    """Give back the first `count` codes of every row."""
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :count].contiguous()
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        fields = torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)
        return fields.reshape(rows, -1)[:, :count].contiguous()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for b in range(bits):
        words |= padded[..., b].to(torch.int64) << (8 * b)
    fields = torch.stack([(words >> (bits * i)) & mask for i in range(8)], dim=-1).to(torch.uint8)
    return fields.reshape(rows, -1)[:, :count].contiguous()
