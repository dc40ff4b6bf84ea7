"""Codes in words of 32 bits, least significant bits first, over the ends of words where their width does not divide 32."""

import torch
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.layouts.dense import pack, row_bytes, unpack

__all__ = ["join_words", "split_apart", "split_words", "words_of"]


def words_of(count: int, bits: int) -> int:
    """Return the number of words that codes take side by side, the last one filled up."""
    return -(-count * bits // 32)


def join_words(
    codes: Int[torch.Tensor, "rows count"], bits: int, *, down: bool = False, fill: bool = False
) -> Int[torch.Tensor, "a b"]:
    """Pack codes along the rows or, with `down`, along the columns, into int32.

    With `fill` the last word of each is filled up with zeros. Raises FormatError for codes that would need that and may not have it.
    """
    rows = codes.T if down else codes
    if rows.shape[1] * bits % 32 and not fill:
        raise FormatError(f"{rows.shape[1]} codes of {bits} bits do not fill words of 32 bits.")
    packed = pack(rows.to(torch.uint8).contiguous(), bits)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    words = packed.reshape(-1).view(torch.int32).reshape(len(rows), -1)
    return words.T.clone(memory_format=torch.contiguous_format) if down else words


def split_words(
    words: torch.Tensor, bits: int, *, down: bool = False, count: int | None = None
) -> Int[torch.Tensor, "rows count"]:
    """Return the codes of `join_words`, `count` of them where the last word was filled up.

    Raises FormatError for another type of word, or words that do not hold that many codes.
    """
    rows = _rows(words, down)
    if count is None and rows.shape[1] * 32 % bits:
        raise FormatError(f"{rows.shape[1]} words of 32 bits do not hold a whole number of codes of {bits} bits.")
    held = rows.shape[1] * 32 // bits if count is None else count
    if words_of(held, bits) != rows.shape[1]:
        raise FormatError(f"{held} codes of {bits} bits take {words_of(held, bits)} words of 32 bits, not {rows.shape[1]}.")
    octets = rows.reshape(-1).view(torch.uint8).reshape(len(rows), -1)
    codes = unpack(octets[:, : row_bytes(held, bits)].contiguous(), bits, held)
    return codes.T.contiguous() if down else codes


def split_apart(words: torch.Tensor, bits: int, count: int, *, down: bool = False) -> Int[torch.Tensor, "rows count"]:
    """Return codes that do not go over the ends of words, whose highest bits are unused where `bits` does not divide 32."""
    rows, each = _rows(words, down), 32 // bits
    if -(-count // each) != rows.shape[1]:
        raise FormatError(f"{count} codes, {each} in a word, take {-(-count // each)} words, not {rows.shape[1]}.")
    fields = rows[..., None] >> torch.arange(0, each * bits, bits, dtype=torch.int32) & ((1 << bits) - 1)
    codes = fields.flatten(1)[:, :count].to(torch.uint8)
    return codes.T.contiguous() if down else codes.contiguous()


def _rows(words: torch.Tensor, down: bool) -> torch.Tensor:
    if words.ndim != 2 or not words.numel() or words.dtype not in (torch.int32, torch.uint32):
        raise FormatError(f"packed codes are {words.dtype} {list(words.shape)} where 32-bit words in two axes are needed.")
    return (words.T if down else words).contiguous().view(torch.int32)
