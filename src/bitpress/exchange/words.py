"""Codes in words of 32 bits, least significant bits first, over the ends of words where their width does not divide 32."""

import torch
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.layouts.dense import pack, unpack

__all__ = ["join_words", "split_words"]


def join_words(codes: Int[torch.Tensor, "rows count"], bits: int, *, down: bool = False) -> Int[torch.Tensor, "a b"]:
    """Pack codes along the rows or, with `down`, along the columns, into int32. Raises FormatError if they do not fill whole words."""
    rows = codes.T if down else codes
    if rows.shape[1] * bits % 32:
        raise FormatError(f"{rows.shape[1]} codes of {bits} bits do not fill words of 32 bits.")
    packed = pack(rows.to(torch.uint8).contiguous(), bits)
    words = packed.reshape(-1).view(torch.int32).reshape(len(rows), -1)
    return words.T.contiguous() if down else words


def split_words(words: Int[torch.Tensor, "a b"], bits: int, *, down: bool = False) -> Int[torch.Tensor, "rows count"]:
    """Return the codes of `join_words`. Raises FormatError for another type of word, or words that hold no whole number of codes."""
    if words.ndim != 2 or words.dtype not in (torch.int32, torch.uint32):
        raise FormatError(f"packed codes are {words.dtype} {list(words.shape)} where 32-bit words in two axes are needed.")
    rows = (words.T if down else words).contiguous()
    if rows.shape[1] * 32 % bits:
        raise FormatError(f"{rows.shape[1]} words of 32 bits do not hold a whole number of codes of {bits} bits.")
    codes = unpack(rows.reshape(-1).view(torch.uint8).reshape(len(rows), -1), bits, rows.shape[1] * 32 // bits)
    return codes.T.contiguous() if down else codes
