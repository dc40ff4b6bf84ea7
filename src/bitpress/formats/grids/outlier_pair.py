"""OliVe: an outlier takes the place of its neighbor. Two weights in a code, both normal, or an outlier and a victim that becomes zero.

Source   Guo et al. 2023, "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization", and the
         authors' public code (ANT-Quantization, olive_quantization): the values, the 3-sigma rule, and the choice between integers and
         `flint`, whose normal values follow powers of two.
Differs  the squared error of the pair decides which weight is the victim, and which of two outliers stays. The scale search covers
         scales that put the largest weight on a level, and some around the 3-sigma range, not 88 multiples of the latter. Digits
         are unsigned with a zero in the middle, where the hardware has two's complement and 1000 for the victim. olive4a chooses
         between integers and flint for every block, the code for every tensor.

    code          first digit | second digit << b        digits of b = 4 bits (olive4, olive4f, olive4a) or 8 (olive8)
    normal        digit - z        the sign times normal[|digit - z|]        z = 2^(b-1) - 1
    2^b - 1       "the other one is an outlier, this one is its victim"
    outlier       r = digit - z is not 0: the sign of r times outlier[|r|]

              normal                  outlier, |r| = 1 ..
    olive4    0 1 2 .. 7              12 16 24 32 48 64 96
    olive4f   0 1 2 3 4 6 8 16        24 32 48 64 96 128 192
    olive4a   as olive4 where which = 0, as olive4f where which = 1: one bit a block
    olive8    0 1 2 .. 127            132 136 .. 252 256 264 .. 504 512 .. 2016

The outliers are the paper's abfloat: a sign, two bits of exponent and the rest mantissa, biased to begin above the normal values: (1 + j /
2^m) 2^i for i = 0 to 3 and m = 1 or 5, less the first. Two victims, or a victim beside a zero, are invalid: 253 of 256 codes stand
for something, or 65,533 of 65,536.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.layouts.dense import code_dtype

__all__ = ["FLINT4", "INT4", "INT8", "OutlierPair", "PairTable"]

# Scales to try: those that bring the largest weight to the largest normal value, to these multiples of it and to every outlier of
# `_few`, and those that bring the largest normal value to these multiples of the 3-sigma range. In blocks of 16 to 256 that are
# normal, t-distributed or have 0.3% outliers, the squared error of 4 bits is within 6% of that of 150 scales.
BEYOND = (7.5 / 7, 8 / 7, 9.5 / 7)
SIGMA_RATIOS = (0.75, 0.85, 0.95, 1.1)
# Pairs at a time: some 50 MB of temporaries.
TOGETHER = 1 << 20


@dataclass(frozen=True)
class PairTable:
    """The magnitudes of normal values, from 0, and of outliers, both rising; as many as the digits of `bits` bits number."""

    bits: int
    normal: tuple[float, ...]
    outlier: tuple[float, ...]

    @property
    def even(self) -> bool:
        """Whether normal values are integers."""
        return self.normal[-1] == len(self.normal) - 1

    @property
    def zero(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def victim(self) -> int:
        return (1 << self.bits) - 1


def _abfloat(mantissa_bits: int, first: float) -> tuple[float, ...]:
    steps = 1 << mantissa_bits
    return tuple(first * (1 + j / steps) * 2**i for i in range(4) for j in range(steps))[1:]


INT4 = PairTable(4, tuple(map(float, range(8))), _abfloat(1, 8.0))
FLINT4 = PairTable(4, (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0), _abfloat(1, 16.0))
INT8 = PairTable(8, tuple(map(float, range(128))), _abfloat(5, 128.0))


@dataclass(frozen=True)
class OutlierPair:
    name: str
    tables: tuple[PairTable, ...]

    @property
    def code_bits(self) -> int:
        return 2 * self.tables[0].bits

    @property
    def num_codes(self) -> int:
        return (1 << self.code_bits) - 3

    @property
    def span(self) -> int:
        return 2

    @property
    def usual_scale(self) -> str:
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        scale = StoredParam("scale", "scale")
        return (scale, StoredParam("which", "code", bits=1)) if len(self.tables) > 1 else (scale,)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the scale and the table of the least squared error (weighted by `importance`); a block of zeros gets 0.

        The first scale puts the largest weight at the largest normal value and clips nothing.
        """
        top = blocks.abs().amax(-1, keepdim=True)
        # Divided by the largest weight, so that no square is out of the range of float32.
        relative = blocks / torch.where(top == 0, 1.0, top)
        best, best_error = torch.zeros_like(top), torch.full_like(top, torch.inf)
        which = torch.zeros_like(top)
        mean = relative.abs().mean(-1, keepdim=True)
        for index, table in enumerate(self.tables):
            for scale in _scales_to_try(relative, table):
                # If the normal values end below the mean magnitude, most weights would be outliers: skip the scale.
                at = (table.normal[-1] * scale >= 0.75 * mean)[:, 0].nonzero()[:, 0]
                some, tried = relative[at], {"scale": scale[at], "which": which[at] * 0 + index}
                error = self.decode(self.encode(some, tried), tried).sub_(some).square_()
                total = (error if importance is None else error.mul_(importance[at])).sum(-1, keepdim=True)
                better = total < best_error[at]
                best[at] = torch.where(better, tried["scale"], best[at])
                which[at] = torch.where(better, tried["which"], which[at])
                best_error[at] = torch.where(better, total, best_error[at])
        found = {"scale": best * top, "which": which}
        return {p.name: found[p.name] for p in self.params}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        scale = params["scale"]
        pairs = (values / torch.where(scale == 0, 1.0, scale)).reshape(-1, 2).contiguous()
        shape = (*values.shape[:-1], values.shape[-1] // 2)
        codes = _encoded(pairs, self.tables[0])
        for index, table in enumerate(self.tables[1:], 1):
            here = (params["which"].expand(shape) == index).reshape(-1)
            codes[here] = _encoded(pairs[here], table)
        return codes.reshape(shape)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        at = codes.int()
        if len(self.tables) > 1:
            at = at + (params["which"].int() << self.code_bits)
        values = _pairs(self.tables, codes.device)[at]
        return values.reshape(*codes.shape[:-1], codes.shape[-1] * 2) * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for a code with a victim but no outlier; they are the same in all tables."""
        if bool(_pairs(self.tables[:1], codes.device)[codes.int()].isnan().any()):
            raise FormatError(f"{self.name}: a code has a victim without its outlier; the file is damaged.")


def _scales_to_try(relative: Float[torch.Tensor, "blocks n"], table: PairTable) -> Iterator[Float[torch.Tensor, "blocks 1"]]:
    one, most = relative.new_ones(len(relative), 1), table.normal[-1]
    for reach in (most, *(most * ratio for ratio in BEYOND), *_few(table.outlier)):
        yield one / reach
    sigma = relative.std(-1, correction=0, keepdim=True)
    spread = relative.mean(-1, keepdim=True).abs() + 3 * sigma
    for ratio in SIGMA_RATIOS:
        yield spread * ratio / most


def _few(outliers: tuple[float, ...]) -> tuple[float, ...]:
    """Return all outliers of 4 bits, and of 8 bits some that are spaced alike."""
    return outliers if len(outliers) < 8 else outliers[15::16]


@cache
def _pairs(tables: tuple[PairTable, ...], device: torch.device) -> Float[torch.Tensor, "codes 2"]:
    """Return the two values of every code of every table, one table after the other; NaN for invalid codes."""
    return torch.cat([_pairs_of(table) for table in tables]).to(device)


def _pairs_of(table: PairTable) -> Float[torch.Tensor, "codes 2"]:
    rank = torch.arange(1 << table.bits) - table.zero
    # The digit of a victim has no normal value, and no outlier; zero is no outlier.
    normal = torch.tensor((*table.normal, torch.nan))[rank.abs()] * rank.sign()
    outlier = torch.tensor((torch.nan, *table.outlier, torch.nan))[rank.abs()] * rank.sign()
    first, second = normal.repeat(len(rank)), normal.repeat_interleave(len(rank))
    digits = torch.arange(len(rank) ** 2)
    victims = torch.stack([digits % len(rank) == table.victim, digits // len(rank) == table.victim])
    pairs = torch.stack([first, second], dim=-1)
    big = torch.stack([outlier.repeat(len(rank)), outlier.repeat_interleave(len(rank))], dim=-1)
    pairs = torch.where(victims[1][:, None], torch.stack([big[:, 0], torch.zeros_like(first)], dim=-1), pairs)
    pairs = torch.where(victims[0][:, None], torch.stack([torch.zeros_like(first), big[:, 1]], dim=-1), pairs)
    return torch.where(pairs.isnan().any(-1, keepdim=True), torch.nan, pairs)


def _encoded(pairs: Float[torch.Tensor, "n 2"], table: PairTable) -> Int[torch.Tensor, " n"]:
    return torch.cat([_nearest(piece, table) for piece in pairs.split(TOGETHER)])


@cache
def _middles(magnitudes: tuple[float, ...], device: torch.device) -> Float[torch.Tensor, " less_one"]:
    levels = torch.tensor(magnitudes, device=device)
    return (levels[1:] + levels[:-1]) / 2


def _nearest(pairs: Float[torch.Tensor, "n 2"], table: PairTable) -> Int[torch.Tensor, " n"]:
    """Return the nearest of the three best: both normal, the first an outlier, the second an outlier."""
    dtype, bits = code_dtype(2 * table.bits), table.bits
    normal, size = torch.tensor(table.normal, device=pairs.device), pairs.abs()
    most = len(table.normal) - 1
    rank = size.round().clamp_(max=most).long() if table.even else torch.bucketize(size, _middles(table.normal, pairs.device))
    digits = torch.where(pairs < 0, -rank, rank).add_(table.zero).to(dtype)
    codes = digits[:, 0] | digits[:, 1] << bits
    # Most pairs are below and need no more work: the largest normal value is at least as near as the first outlier, and a victim's
    # error is never below a normal value's.
    far = (size.amax(-1) > (table.normal[-1] + table.outlier[0]) / 2).nonzero()[:, 0]
    code, size = codes[far], size[far]
    beyond = torch.bucketize(size, _middles(table.outlier, pairs.device)) + 1
    outlier = torch.tensor((0.0, *table.outlier), device=pairs.device)[beyond]
    signed = torch.where(pairs[far] < 0, -beyond, beyond).add_(table.zero).to(dtype)
    least = (size - normal[rank[far]]).square().sum(-1)
    # An outlier's own error plus its whole victim.
    error = (size - outlier).square() + size.square().flip(-1)
    for at, both in ((0, signed[:, 0] | table.victim << bits), (1, signed[:, 1] << bits | table.victim)):
        better = error[:, at] < least
        code, least = torch.where(better, both, code), torch.where(better, error[:, at], least)
    codes[far] = code
    return codes
