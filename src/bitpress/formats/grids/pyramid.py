"""Pyramid vector quantization: N weights as a length and the direction of an integer point whose magnitudes sum to K.

    w_hat = p / |p|_2 * scale          p in Z^N with |p_1| + ... + |p_N| = K; the block's scale is the length

Source   Fischer 1986, "A Pyramid Vector Quantizer", for the points and their numbers; van der Ouderaa et al. 2024, "Pyramid Vector
         Quantization for LLMs", for directions and lengths of weights.
Differs  the nearest direction is found exactly, without rounding and correcting. The scale is not the length of the weights but their
         projection on the chosen directions, which has the least squared error. Any scale store holds the lengths (6 bits by
         default), not the quantizer that the later paper derives for them.
Needs    blocks of N weights (`pvq8k5-g8`) for a length per vector. Vectors that share a scale share a length, right only on average.
Cost     encode: as many candidates as K has partitions into at most N parts, 7 for N = 8, K = 5.

Points are counted by N(l, k) = N(l-1, k) + N(l-1, k-1) + N(l, k-1), and a code is an index into the list of all points, sorted by the
first number, then the second, ... in the order 0, 1, -1, 2, -2, ...: for N = 3 and K = 2 there are 18,

    >>> import torch
    >>> Pyramid(3, 2).points(torch.tensor([0, 1, 2, 8, 15, 16, 17])).tolist()
    [[0, 0, 2], [0, 0, -2], [0, 1, 1], [1, 0, 1], [-1, -1, 0], [2, 0, 0], [-2, 0, 0]]
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

__all__ = ["Pyramid"]

# Numbers in the largest temporary of one step.
TOGETHER = 1 << 22
# Up to this many points, decoding reads a cached list instead of counting.
LISTED = 1 << 16


@dataclass(frozen=True)
class Pyramid:
    dim: int
    pulses: int

    def __post_init__(self) -> None:
        if not (2 <= self.dim <= 32 and 1 <= self.pulses <= 32):
            raise FormatError(f"{self.name}: N must be 2 to 32 and K 1 to 32.")
        if self.code_bits > 24:
            raise FormatError(
                f"{self.name}: its {self.num_codes:,} points need {self.code_bits} bits, but a code has at most 24."
            )

    @property
    def name(self) -> str:
        return f"pvq{self.dim}k{self.pulses}"

    @property
    def num_codes(self) -> int:
        return _counts(self.dim, self.pulses)[self.dim][self.pulses]

    @property
    def code_bits(self) -> int:
        return (self.num_codes - 1).bit_length()

    @property
    def span(self) -> int:
        return self.dim

    @property
    def usual_scale(self) -> str:
        return "s6"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Choose the scale of least squared error; the nearest directions do not depend on it. A block of zeros gets 0."""
        directions = torch.cat([self.directions(points) for points in self._nearest(blocks)]).reshape(blocks.shape)
        along = blocks * directions  # never negative: a direction has the signs of its weights
        scale = along.sum(-1, keepdim=True) / (blocks.shape[-1] // self.dim)
        if importance is not None:
            total = (importance * directions.square()).sum(-1, keepdim=True)
            weighted = (importance * along).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
            scale = torch.where(weighted > 0, weighted, scale)
        return {"scale": scale}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        # All codewords of a block have one length, so the nearest one has the nearest direction at any scale.
        codes = torch.cat([self._codes(points) for points in self._nearest(values)])
        return codes.to(code_dtype(self.code_bits)).reshape(*values.shape[:-1], values.shape[-1] // self.dim)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        if self.num_codes <= LISTED:
            values = _listed(self, codes.device)[codes.int()]
        else:
            pieces = codes.reshape(-1).split(max(TOGETHER // (self.pulses + self.dim), 1))
            values = torch.cat([self.directions(self.points(piece)) for piece in pieces])
        return values.reshape(*codes.shape[:-1], codes.shape[-1] * self.dim) * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for a code beyond the last point."""
        if bool((codes.int() >= self.num_codes).any()):
            raise FormatError(f"{self.name}: a code is {int(codes.max())}, but there are only {self.num_codes} points.")

    def points(self, codes: Int[torch.Tensor, " n"]) -> Int[torch.Tensor, "n dim"]:
        """Return the integer points of codes."""
        counts, starts = _tables(self.dim, self.pulses, codes.device)
        rest = codes.to(torch.int32)
        left = torch.full_like(rest, self.pulses)
        points = torch.empty(len(codes), self.dim, dtype=torch.int32, device=codes.device)
        for i in range(self.dim):
            after = self.dim - 1 - i
            row = starts[after][left]  # [n, pulses + 1]
            size = (rest[:, None] >= row).sum(-1, dtype=torch.int32) - 1
            rest = rest - row.gather(-1, size[:, None].long()).squeeze(-1)
            left = left - size
            each = counts[after][left]
            negative = (size > 0) & (rest >= each)
            rest = torch.where(negative, rest - each, rest)
            points[:, i] = torch.where(negative, -size, size)
        return points

    def _codes(self, points: Int[torch.Tensor, "n dim"]) -> Int[torch.Tensor, " n"]:
        counts, starts = _tables(self.dim, self.pulses, points.device)
        codes = torch.zeros(len(points), dtype=torch.int32, device=points.device)
        left = torch.full_like(codes, self.pulses)
        for i in range(self.dim):
            after, size = self.dim - 1 - i, points[:, i].abs()
            codes += starts[after][left, size]
            left = left - size
            codes += torch.where(points[:, i] < 0, counts[after][left], 0)
        return codes

    def _nearest(self, values: Float[torch.Tensor, "... n"]) -> Iterator[Int[torch.Tensor, "n dim"]]:
        """Yield the point of the nearest direction for every vector, some vectors at a time.

        Of all permutations of the same magnitudes, the one sorted like the vector has the largest inner product. One candidate per
        partition of K is therefore enough.
        """
        shapes = _partitions(self.dim, self.pulses, values.device)
        lengths = shapes.square().sum(-1).sqrt()
        for piece in values.reshape(-1, self.dim).split(max(TOGETHER // (len(shapes) + self.dim), 1)):
            ordered, order = piece.abs().sort(dim=-1, descending=True)
            shape = shapes[(ordered @ (shapes / lengths[:, None]).T).argmax(-1)]
            magnitudes = torch.empty_like(shape).scatter_(-1, order, shape)
            yield torch.where(piece < 0, -magnitudes, magnitudes).to(torch.int32)

    @staticmethod
    def directions(points: Int[torch.Tensor, "n dim"]) -> Float[torch.Tensor, "n dim"]:
        """Return points scaled to length 1."""
        real = points.float()
        return real / real.square().sum(-1, keepdim=True).sqrt()


@cache
def _listed(grid: Pyramid, device: torch.device) -> Float[torch.Tensor, "points dim"]:
    return grid.directions(grid.points(torch.arange(grid.num_codes, device=device)))


@cache
def _counts(dim: int, pulses: int) -> list[list[int]]:
    """Return N(l, k) for l up to `dim` and k up to `pulses`."""
    table = [[1] + [0] * pulses]
    for _ in range(dim):
        row = [1]
        for k in range(1, pulses + 1):
            row.append(table[-1][k] + table[-1][k - 1] + row[k - 1])
        table.append(row)
    return table


@cache
def _tables(dim: int, pulses: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return N(l, k) [dim, pulses + 1], and the index of the first vector of l + 1 numbers that begins with magnitude a [dim, k, a].

    For a > k, where there is none, the entry is the number of all vectors.
    """
    counts = _counts(dim, pulses)
    starts = torch.zeros(dim, pulses + 1, pulses + 1, dtype=torch.int64)
    for after in range(dim):
        for k in range(pulses + 1):
            below = 0
            for a in range(pulses + 1):
                starts[after, k, a] = below
                if a <= k:
                    below += counts[after][k - a] * (1 if a == 0 else 2)
    return torch.tensor(counts[:dim], dtype=torch.int32, device=device), starts.to(torch.int32).to(device)


@cache
def _partitions(dim: int, pulses: int, device: torch.device) -> Float[torch.Tensor, "partitions dim"]:
    """Yield every way to write K as at most N whole numbers, largest first."""

    def split(total: int, parts: int, largest: int) -> Iterator[tuple[int, ...]]:
        if parts == 0 or total == 0:
            if total == 0:
                yield (0,) * parts
            return
        for first in range(min(total, largest), 0, -1):
            for rest in split(total - first, parts - 1, first):
                yield (first, *rest)

    return torch.tensor(list(split(pulses, dim, pulses)), dtype=torch.float32, device=device)
