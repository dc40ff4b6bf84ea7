"""DFloat11: weights of bfloat16 bit for bit, their exponents entropy-coded: about 11 bits a weight.

    raw      uint8  [out, in]        sign << 7 | mantissa
    lengths  uint8  [parts, 256]     bits of the code of every exponent, 1 to 12, or 0 for one that does not occur
    sizes    uint16 [parts, blocks]  bytes of every block of 1,024 exponents of the part, row after row; the last may be shorter
    codes    uint8  [bytes]          the blocks' codes, most significant bit first; a block ends with fewer than 8 zero bits

The code is the canonical one of its lengths: shorter codes first, among equal lengths smaller exponents first, each code is
the previous one plus one. It is complete, so every bit string decodes; if only one exponent occurs, its neighbor gets a code
too.

Worked example: the exponents 126, 125, 126, 127 with codes of 1, 2, 1 and 2 bits are 0, 10, 0, 11: the byte 01001100.

    >>> import torch
    >>> term = dfloat11(torch.tensor([[0.5, 0.25, -0.5, 1.5]], dtype=torch.bfloat16))
    >>> [f"{byte:08b}" for byte in term.tensors["codes"].tolist()], term.tensors["raw"].tolist()
    (['01001100'], [[0, 0, 128, 64]])

Source   Zhang et al. 2025, "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length
         Float", section 2.3: a Huffman code over the exponents, signs and mantissas as they are.
Differs  every block begins at a byte and stores its length, 0.02 bits per weight, where the paper indexes one long stream by
         offsets of 5 bits per 8 bytes, 0.2 bits per weight, and a first pass that counts. Codes are limited to 12
         bits (the paper's reach 32 and take a hierarchy of tables), so one table of 4,096 entries decodes them; with about
         40 exponents in use the loss is negligible. No exponent is reserved: NaNs and infinities are restored too.
Cost     one step a place in a block, all blocks at once: 1,024 steps however large the weight.
Fails    FormatError when the weight is not bfloat16, and when a block does not end where it says (found while decoding).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import BFloat16, Float, UInt8
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.format import Expected
from bitpress.formats.terms.specs import check_keys, covered, read_parts, read_whole, with_parts

__all__ = ["DFloat11", "dfloat11"]

BLOCK = 1024
LONGEST = 12
_TABLE = 1 << LONGEST
# Blocks handled at a time: many for each step of the decoder, yet few enough for the encoder's numbers to stay in the cache.
_DECODED_TOGETHER = 1 << 12
_ENCODED_TOGETHER = 1 << 8


@dataclass(frozen=True)
class DFloat11:
    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]
    parts: int = 1

    kind: ClassVar[str] = "dfloat11"

    def decode(self) -> BFloat16[torch.Tensor, "out in"]:
        """Return the weights as they were. Raises FormatError when the codes of a block do not fill it exactly."""
        return self._bits().to(torch.int16).view(torch.bfloat16)

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32, NaNs with their payload."""
        return self._bits().bitwise_left_shift_(16).view(torch.float32)

    def spec(self) -> dict[str, Any]:
        return with_parts({"bytes": self.tensors["codes"].numel()}, self.parts)

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that this specification implies."""
        check_keys("dfloat11", spec, {"bytes"}, {"parts"})
        parts, weights = read_parts(spec, shape[0]), shape[0] * shape[1]
        blocks = _blocks(weights // parts)
        num_bytes = read_whole(spec, "bytes", parts * blocks, 2 * weights)
        return {
            "raw": (torch.uint8, shape),
            "lengths": (torch.uint8, (parts, 256)),
            "sizes": (torch.uint16, (parts, blocks)),
            "codes": (torch.uint8, (num_bytes,)),
        }

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "DFloat11":
        return cls(shape, tensors, read_parts(spec, shape[0]))

    def check(self) -> None:
        """Raise FormatError unless the lengths are those of a complete code and the blocks cover the codes exactly."""
        lengths = self.tensors["lengths"].to(torch.int64)
        if bool((lengths > LONGEST).any()):
            raise FormatError(f"an exponent's code is longer than {LONGEST} bits.")
        if bool((_shares(lengths).sum(1) != _TABLE).any()):
            raise FormatError("the lengths of a dfloat11 term are not those of a complete prefix code.")
        sizes, weights = self.tensors["sizes"].to(torch.int64), self._weights_of_blocks()
        if bool((sizes < _bytes(weights)).any()) or bool((sizes > _bytes(weights * LONGEST)).any()):
            raise FormatError("a block of a dfloat11 term has fewer or more bytes than its weights can need.")
        if int(sizes.sum()) != self.tensors["codes"].numel():
            raise FormatError("the blocks of a dfloat11 term do not cover its codes exactly.")

    def row_slice(self, start: int, stop: int) -> "DFloat11":
        """Return rows `start` to `stop`, whole parts of a stack: codes are not cut."""
        first, last = covered(self.shape[0], self.parts, start, stop)
        height = self.shape[0] // self.parts
        if start != first * height or stop != last * height:
            raise FormatError(f"rows {start} to {stop} begin or end inside a part of {height} rows that is coded as one.")
        sizes = self.tensors["sizes"].to(torch.int64).sum(1).cumsum(0)
        begin, end = int(sizes[first - 1]) if first else 0, int(sizes[last - 1])
        sliced = {
            "raw": self.tensors["raw"][start:stop],
            "lengths": self.tensors["lengths"][first:last],
            "sizes": self.tensors["sizes"][first:last],
            "codes": self.tensors["codes"][begin:end],
        }
        return DFloat11((stop - start, self.shape[1]), sliced, last - first)

    @classmethod
    def stack_rows(cls, terms: Sequence["DFloat11"]) -> "DFloat11":
        """Put terms of one shape below each other; each keeps its own code."""
        first = terms[0]
        if any(t.shape != first.shape or t.parts != first.parts for t in terms):
            raise FormatError("only dfloat11 terms of one shape can be stacked.")
        joined = {name: torch.cat([t.tensors[name] for t in terms]) for name in ("raw", "lengths", "codes")}
        # Not every operation of torch knows uint16: sizes are joined as the bytes that they are.
        sizes = torch.cat([t.tensors["sizes"].contiguous().view(torch.uint8) for t in terms])
        joined["sizes"] = sizes.view(torch.uint16)
        return cls((first.shape[0] * len(terms), first.shape[1]), joined, first.parts * len(terms))

    def _weights_of_blocks(self) -> Int[torch.Tensor, "parts blocks"]:
        per_part = self.shape[0] * self.shape[1] // self.parts
        weights = torch.full((self.parts, _blocks(per_part)), BLOCK, device=self.tensors["raw"].device)
        weights[:, -1] = per_part - BLOCK * (_blocks(per_part) - 1)
        return weights

    def _bits(self) -> Int[torch.Tensor, "out in"]:
        """Return every weight's 16 bits, in int32."""
        raw = self.tensors["raw"].to(torch.int32)
        exponents = self._exponents().view(self.shape).to(torch.int32)
        return exponents.bitwise_left_shift_(7).bitwise_or_(raw & 0x7F).bitwise_or_((raw & 0x80).bitwise_left_shift_(8))

    def _exponents(self) -> UInt8[torch.Tensor, " weights"]:
        tables = torch.cat([_table(lengths) for lengths in self.tensors["lengths"]])
        weights, sizes = self._weights_of_blocks(), self.tensors["sizes"].to(torch.int64)
        part = torch.arange(self.parts, device=sizes.device)[:, None].expand_as(sizes)
        weights, sizes, part = weights.reshape(-1), sizes.reshape(-1), part.reshape(-1)
        ends = sizes.cumsum(0)
        found = []
        for at in range(0, len(sizes), _DECODED_TOGETHER):
            some = slice(at, at + _DECODED_TOGETHER)
            begin, end = int(ends[at] - sizes[at]), int(ends[some][-1])
            codes = self.tensors["codes"][begin:end]
            exponents = _decode(codes, ends[some] - begin, sizes[some], weights[some], part[some] * _TABLE, tables)
            used = torch.arange(exponents.shape[1], device=codes.device) < weights[some, None]
            found.append(exponents.reshape(-1) if bool(used.all()) else exponents[used])
        return torch.cat(found)


def dfloat11(w: Float[torch.Tensor, "out in"]) -> DFloat11:
    """Encode a weight without loss. Raises FormatError if it is not bfloat16."""
    if w.dtype != torch.bfloat16:
        raise FormatError(f"dfloat11 needs bfloat16 weights; this weight is {w.dtype}.")
    bits = w.contiguous().view(torch.int16).to(torch.int32)
    exponents = ((bits >> 7) & 0xFF).to(torch.uint8).reshape(-1)
    raw = ((bits & 0x7F) | ((bits >> 8) & 0x80)).to(torch.uint8)
    lengths = _code_lengths(torch.bincount(exponents, minlength=256))
    codes, sizes = [], []
    step = BLOCK * _ENCODED_TOGETHER
    for at in range(0, len(exponents), step):
        chunk_codes, chunk_sizes = _encode(exponents[at : at + step], lengths)
        codes.append(chunk_codes)
        sizes.append(chunk_sizes)
    tensors = {
        "raw": raw,
        "lengths": lengths.to(torch.uint8)[None],
        "sizes": torch.cat(sizes).to(torch.uint16)[None],
        "codes": torch.cat(codes),
    }
    return DFloat11((w.shape[0], w.shape[1]), tensors)


def _code_lengths(counts: Int[torch.Tensor, " symbols"]) -> Int[torch.Tensor, " symbols"]:
    """Return the lengths of the best prefix code of at most 12 bits, by package-merge (Larmore and Hirschberg 1990)."""
    used = counts.nonzero()[:, 0]
    if len(used) == 1:  # one code alone would leave the code incomplete
        used = torch.stack([used[0], (used[0] + 1) % len(counts)])
    leaves, alone = counts[used], torch.eye(len(used), dtype=torch.int64, device=counts.device)
    order = torch.argsort(leaves, stable=True)
    weights, holds = leaves[order], alone[order]  # how often each symbol is in a package
    for _ in range(LONGEST - 1):
        even = len(weights) // 2 * 2
        weights = torch.cat([leaves, weights[:even:2] + weights[1:even:2]])
        holds = torch.cat([alone, holds[:even:2] + holds[1:even:2]])
        order = torch.argsort(weights, stable=True)
        weights, holds = weights[order], holds[order]
    lengths = torch.zeros_like(counts)
    lengths[used] = holds[: 2 * len(used) - 2].sum(0)
    return lengths


def _blocks(weights: int) -> int:
    return -(-weights // BLOCK)


def _bytes(bits: torch.Tensor) -> torch.Tensor:
    return (bits + 7) // 8


def _shares(lengths: Int[torch.Tensor, "*parts 256"]) -> Int[torch.Tensor, "*parts 256"]:
    """Return the number of table entries that begin with each symbol's code; 4,096 in total for a complete code."""
    return torch.where(lengths > 0, _TABLE >> lengths, 0)


def _in_order(lengths: Int[torch.Tensor, " 256"]) -> Int[torch.Tensor, " 256"]:
    """Return the symbols in the order of their codes; those without a code come first and take no room."""
    return torch.argsort(lengths, stable=True)


def _table(lengths: UInt8[torch.Tensor, " 256"]) -> Int[torch.Tensor, " 4096"]:
    """Return the table of the next 12 bits: the symbol that they begin with, and above its 8 bits the length of its code."""
    lengths = lengths.to(torch.int64)
    order = _in_order(lengths)
    entries = order | (lengths[order] << 8)
    return entries.repeat_interleave(_shares(lengths)[order]).to(torch.int16)


def _encode(
    exponents: UInt8[torch.Tensor, " weights"], lengths: Int[torch.Tensor, " 256"]
) -> tuple[UInt8[torch.Tensor, " bytes"], Int[torch.Tensor, " blocks"]]:
    """Return the codes of some blocks, and the bytes of each."""
    order = _in_order(lengths)
    ends = _shares(lengths)[order].cumsum(0)
    first = torch.zeros_like(ends)
    first[order] = ends - _shares(lengths)[order]  # a code with zeros behind it to 12 bits
    blocks = _blocks(len(exponents))
    symbols = torch.nn.functional.pad(exponents, (0, blocks * BLOCK - len(exponents))).to(torch.int32)
    size, code = (values.to(torch.int32).index_select(0, symbols) for values in (lengths, first << (24 - LONGEST)))
    size[len(exponents) :] = code[len(exponents) :] = 0
    end = size.view(blocks, BLOCK).cumsum(1, dtype=torch.int32)
    sizes = _bytes(end[:, -1])
    at = end.add_(((sizes.cumsum(0, dtype=torch.int32) - sizes) * 8)[:, None]).view(-1).sub_(size)
    # A code begins at one of 8 bits and takes at most 12: it lies in three bytes. No two share a bit, so their sum joins them.
    shifted, place = code >> (at & 7), at >> 3
    joined = torch.zeros(int(sizes.sum()) + 3, dtype=torch.int32, device=exponents.device)
    for i in range(3):
        joined[i:].index_add_(0, place, (shifted >> (16 - 8 * i)) & 0xFF)
    return joined[:-3].to(torch.uint8), sizes


def _decode(
    codes: UInt8[torch.Tensor, " bytes"],
    ends: Int[torch.Tensor, " blocks"],
    sizes: Int[torch.Tensor, " blocks"],
    weights: Int[torch.Tensor, " blocks"],
    base: Int[torch.Tensor, " blocks"],
    tables: Int[torch.Tensor, " entries"],
) -> UInt8[torch.Tensor, "blocks steps"]:
    """Decode blocks in parallel, one symbol of each per step; a short block runs past its end, and the extra symbols are ignored."""
    # The symbol at every bit position, so that a step is one look-up and one addition. No block reads beyond 1,024 codes of 12 bits
    # from its start, and no code beyond the third byte from its own.
    far = torch.nn.functional.pad(codes, (0, BLOCK * LONGEST // 8 + 3)).to(torch.int32)
    words = (far[:-2] << 16) | (far[1:-1] << 8) | far[2:]
    table = torch.nn.functional.pad(base.to(torch.int32).repeat_interleave(sizes), (0, len(words) - len(codes)))
    entries = torch.empty(len(words), 8, dtype=torch.int16, device=codes.device)
    for bit in range(8):
        window = (words >> (24 - LONGEST - bit)).bitwise_and_(_TABLE - 1).add_(table)
        entries[:, bit] = tables[window]
    entries = entries.view(-1)
    at = ((ends - sizes) * 8).to(torch.int32)
    stop = torch.zeros_like(at)
    endings = torch.unique(weights).tolist()
    found = torch.empty(endings[-1], len(at), dtype=torch.int16, device=codes.device)
    for step, entry in enumerate(found.unbind()):
        if step in endings:
            stop = torch.where(weights == step, at, stop)
        torch.index_select(entries, 0, at, out=entry)
        at.add_(entry >> 8)
    stop = torch.where(weights == endings[-1], at, stop)
    # The bits from a block's end to its last byte's end are zeros, fewer than 8.
    left = (ends * 8).to(torch.int32) - stop
    inside = bool(((left >= 0) & (left < 8)).all())
    if not inside or bool((far[ends - 1] & ((1 << left) - 1)).any()):
        raise FormatError("a block of a dfloat11 term does not end at its stated length; the codes are damaged.")
    return found.bitwise_and_(0xFF).to(torch.uint8).T.contiguous()
