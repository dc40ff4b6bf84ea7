"""GGUF's types of blocks: which format of ours each one is, and its bytes field by field.

A block holds 32, 64 or 256 weights of a row. Its codes, scales and minima go into the tensors of a `Packed` and back, bit for bit.
`Bits` are small numbers side by side in bytes: `run` bytes hold, in their lowest bits, the first `run` numbers, then in the next bits the
next `run`, and so on; `shift` is where these bits belong in the numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitpress.errors import FormatError
from bitpress.formats import Format, Packed, parse_format
from bitpress.formats.layouts import dense

__all__ = ["BLOCK_TYPES", "BlockType", "read_blocks", "write_blocks"]

# Numbers of a block by the names of a `Packed`: codes and small scales `[blocks, count]`, floats and bytes as they are stored.
Fields = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Bits:
    """Bits of the numbers `name`, `flip` exclusive-ored into them."""

    name: str
    nbytes: int
    bits: int
    run: int
    shift: int = 0
    flip: int = 0

    def split(self, raw: torch.Tensor, fields: Fields) -> None:
        parts = raw.view(len(raw), -1, self.run)
        shifts = range(0, 8, self.bits)
        mask = (1 << self.bits) - 1
        numbers = torch.stack([parts >> by & mask for by in shifts], 2).flatten(1) ^ self.flip
        fields[self.name] = fields[self.name] | numbers << self.shift if self.name in fields else numbers << self.shift

    def join(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = (1 << self.bits) - 1
        numbers = (fields[self.name] >> self.shift & mask) ^ self.flip
        parts = numbers.view(len(numbers), -1, 8 // self.bits, self.run)
        raw = parts[:, :, 0].clone()
        for i, by in enumerate(range(0, 8, self.bits)):
            raw |= parts[:, :, i] << by
        return raw.flatten(1)


@dataclass(frozen=True)
class Raw:
    """Bytes as they are; `negated`: a float16 of the other sign."""

    name: str
    nbytes: int = 2
    negated: bool = False

    def split(self, raw: torch.Tensor, fields: Fields) -> None:
        fields[self.name] = self._turned(raw)

    def join(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._turned(fields[self.name])

    def _turned(self, raw: torch.Tensor) -> torch.Tensor:
        return raw ^ torch.tensor([0, 128], dtype=torch.uint8) if self.negated else raw


@dataclass(frozen=True)
class Nibbles:
    """A scale in the low and a minimum in the high half of every byte (Q2_K)."""

    nbytes: int = 16

    def split(self, raw: torch.Tensor, fields: Fields) -> None:
        fields["scale"], fields["min"] = raw & 15, raw >> 4

    def join(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fields["scale"] | fields["min"] << 4


@dataclass(frozen=True)
class Twelve:
    """Eight scales and eight minima of 6 bits (Q4_K, Q5_K): four of each whole, the high bits of the other four above them."""

    nbytes: int = 12

    def split(self, raw: torch.Tensor, fields: Fields) -> None:
        first, second, rest = raw[:, :4], raw[:, 4:8], raw[:, 8:]
        fields["scale"] = torch.cat([first & 63, rest & 15 | first >> 2 & 48], 1)
        fields["min"] = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], 1)

    def join(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale, low = fields["scale"], fields["min"]
        first, second = (part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scale, low))
        return torch.cat([first, second, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4], 1)


@dataclass(frozen=True)
class Trits:
    """Five digits to the base 3 in a byte, as a fraction of 256 that multiplying by 3 brings forth digit by digit (TQ1_0)."""

    nbytes: int = 52

    def split(self, raw: torch.Tensor, fields: Fields) -> None:
        digits = [((raw.int() * 3**i & 255) * 3 >> 8).to(torch.uint8) for i in range(5)]
        parts = [d[:, :32] for d in digits] + [d[:, 32:48] for d in digits] + [d[:, 48:] for d in digits[:4]]
        fields["codes"] = torch.cat(parts, 1)

    def join(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = fields["codes"].int()
        parts = [codes[:, :160].view(-1, 5, 32), codes[:, 160:240].view(-1, 5, 16), codes[:, 240:].view(-1, 4, 4)]
        whole = [sum(part[:, i] * 3 ** (4 - i) for i in range(part.shape[1])) for part in parts]
        return ((torch.cat([torch.as_tensor(w) for w in whole], 1) * 256 + 242) // 243).to(torch.uint8)


Field = Bits | Raw | Nibbles | Twelve | Trits


@dataclass(frozen=True)
class BlockType:
    """One type: ggml's number of it, the format of ours that it is, and its fields in the order of the bytes."""

    number: int
    format: str
    weights: int
    fields: tuple[Field, ...]

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self.fields)

    @property
    def bits(self) -> float:
        return self.nbytes * 8 / self.weights


_SCALE, _STEPS, _FOUR = Raw("scale"), (Raw("scale_run"), Raw("min_run")), Bits("codes", 16, 4, 16)
BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(2, "q4_0", 32, (_SCALE, _FOUR)),
    "Q4_1": BlockType(3, "q4_1", 32, (_SCALE, Raw("min", negated=True), _FOUR)),
    "Q5_0": BlockType(6, "q5_0", 32, (_SCALE, Bits("codes", 4, 1, 1, shift=4), _FOUR)),
    "Q5_1": BlockType(7, "q5_1", 32, (_SCALE, Raw("min", negated=True), Bits("codes", 4, 1, 1, shift=4), _FOUR)),
    "Q8_0": BlockType(8, "q8_0", 32, (_SCALE, Bits("codes", 32, 8, 1, flip=128))),
    "Q2_K": BlockType(10, "q2_k", 256, (Nibbles(), Bits("codes", 64, 2, 32), *_STEPS)),
    "Q3_K": BlockType(
        11,
        "q3_k",
        256,
        (
            *(Bits("codes", 32, 1, 32, shift=2), Bits("codes", 64, 2, 32)),
            *(Bits("scale", 8, 4, 8), Bits("scale", 4, 2, 4, shift=4), Raw("scale_run")),
        ),
    ),
    "Q4_K": BlockType(12, "q4_k", 256, (*_STEPS, Twelve(), Bits("codes", 128, 4, 32))),
    "Q5_K": BlockType(13, "q5_k", 256, (*_STEPS, Twelve(), Bits("codes", 32, 1, 32, shift=4), Bits("codes", 128, 4, 32))),
    "Q6_K": BlockType(
        14,
        "q6_k",
        256,
        (
            *(Bits("codes", 128, 4, 64), Bits("codes", 64, 2, 32, shift=4)),
            *(Bits("scale", 16, 8, 1, flip=128), Raw("scale_run")),
        ),
    ),
    "IQ4_NL": BlockType(20, "iq4_nl", 32, (_SCALE, _FOUR)),
    "IQ4_XS": BlockType(
        23,
        "iq4_xs",
        256,
        (Raw("scale_run"), Bits("scale", 2, 2, 1, shift=4), Bits("scale", 4, 4, 1), Bits("codes", 128, 4, 16)),
    ),
    "TQ1_0": BlockType(34, "tq1_0", 256, (Trits(), _SCALE)),
    "TQ2_0": BlockType(35, "tq2_0", 256, (Bits("codes", 64, 2, 32), _SCALE)),
    "MXFP4": BlockType(39, "mxfp4", 32, (Raw("scale", 1), _FOUR)),
    "NVFP4": BlockType(40, "nvfp4", 64, (Raw("scale", 4), Bits("codes", 32, 4, 8))),
}


def read_blocks(name: str, raw: torch.Tensor, factor: float = 1.0) -> Packed:
    """Return the weight of rows of blocks, bytes `[out, bytes of a row]`. Raises FormatError for bytes that stand for no numbers.

    `factor` is the scale of the whole tensor that stands beside one of NVFP4.
    """
    kind, rows = BLOCK_TYPES[name], raw.shape[0]
    fmt = parse_format(kind.format)
    blocks = raw.contiguous().view(-1, kind.nbytes)
    fields: Fields = {}
    at = 0
    for field in kind.fields:
        field.split(blocks[:, at : at + field.nbytes].contiguous(), fields)
        at += field.nbytes
    shape = (rows, len(blocks) * kind.weights // rows)
    if name == "NVFP4":
        if bool((fields["scale"] > 126).any()):
            raise FormatError("a scale of NVFP4 is not a number.")
        fields["scale_tensor"] = torch.tensor([factor])
    stored = {part: _packed(fmt, part, values, rows) for part, values in fields.items()}
    packed = Packed(fmt, shape, stored)
    packed.check()
    return packed


def _packed(fmt: Format, name: str, values: torch.Tensor, rows: int) -> torch.Tensor:
    """Return one stored tensor of a term."""
    if name == "codes":
        return fmt.codes_layout.pack(values.view(rows, -1), fmt.grid.code_bits)
    if name.endswith("_tensor"):
        return values
    if _small_bits(fmt, name):
        return dense.pack(values.view(rows, -1), _small_bits(fmt, name))
    return values.view(rows, -1) if fmt.scale in ("e8m0", "fp8") else values.contiguous().view(torch.float16).view(rows, -1)


def _small_bits(fmt: Format, name: str) -> int:
    """Return the bits of scales that are integers under a float of their run; 0 for others."""
    runs = "x" in fmt.scale and name in ("scale", "min")
    return int(fmt.scale[1]) if runs else 0


def write_blocks(name: str, packed: Packed) -> torch.Tensor:
    """Return the bytes of a weight in the format of a type, `[out, bytes of a row]`: what `read_blocks` reads."""
    kind, fmt, (rows, width) = BLOCK_TYPES[name], packed.format, packed.shape
    assert fmt == parse_format(kind.format), f"{fmt.name} is not {name}"
    down = rows * (width // kind.weights)
    fields: Fields = {"codes": packed.unpack_codes().view(down, -1)}
    for part, stored in packed.tensors.items():
        bits = _small_bits(fmt, part)
        if bits:
            fields[part] = dense.unpack(stored, bits, packed.format.block_grid(packed.shape)[1]).view(down, -1)
        elif part != "codes" and not part.endswith("_tensor"):
            fields[part] = stored.contiguous().view(torch.uint8).view(down, -1)
    return torch.cat([field.join(fields) for field in kind.fields], 1).view(rows, -1)
