"""Eight weights as a point of the E8 lattice: QuIP#'s codebooks of 2 bits and of 1 bit a weight, without a search over all points.

Source   Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks"; codewords, their
         order and the scale of e8p are those of the authors' public code (quip-sharp, lib/codebook).
Differs  the nearest codeword is found by sorting, exactly, where the code uses a matrix product; QuIP#'s 3 and 4 bits are sums of two
         terms here, e8p + e81b and e8p + e8p, the second fitted to the residual of the first.
Cost     e8p: 36 candidates per shift instead of 65,536.

    e8p    code = row << 8 | signs        codeword = (magnitudes[row] with signs) + 1/4, or - 1/4 where `signs` has an odd number of ones

The 256 rows of magnitudes are the 227 vectors of {1/2, 3/2, 5/2}^8 with squared norm at most 10, sorted, and 29 of the 56 with squared
norm 12. All codewords less their shift have an even sum, so seven signs are free and the eighth bit gives the shift: bit SIGN_BIT[i] is
the sign of weight i, but bit 7 is turned over for a row of odd sum, and bit 0 for the shift of - 1/4.

    e81b   code = place in the list       the 241 points of E8 with squared norm at most 2, then 15 of the 16 points +-2 e_i

A scale is the block's root mean square divided by that of the codebook's design: 1.03 for e8p, as published, and 0.6 for e81b, which
has the least error both on Gaussian weights and on the residual of e8p (the published 2.04 for the residual amounts to 0.61).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.layouts.dense import code_dtype

__all__ = ["E8P", "E81B", "Lattice"]

# Vectors searched at a time: some 20 MB of temporaries.
TOGETHER = 1 << 15

# The 29 rows of squared norm 12, one bit per weight: bit i is set if magnitude i is 3/2, not 1/2.
NORM12 = (
    *(0xF1, 0xF2, 0xF4, 0xF8, 0x37, 0x57, 0x67, 0x97, 0xA7, 0xC7, 0x3B, 0x5B, 0x6B, 0x9B, 0xAB),
    *(0xCB, 0x3D, 0x5D, 0x6D, 0x9D, 0xAD, 0xCE, 0x3E, 0x5E, 0x6E, 0x9E, 0xAE, 0xEC, 0x73),
)
# Magnitudes of the other rows, each representing all its permutations.
SHAPES = (
    *((1.5,) * many + (0.5,) * (8 - many) for many in range(5)),
    (2.5, *(0.5,) * 7),
    (2.5, 1.5, *(0.5,) * 6),
)
SIGN_BIT = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Lattice:
    """A fixed list of vectors of eight, `codewords(device)`, and the search for the nearest, `nearest(vectors)`.

    rms    the root mean square of weights for which the list is designed.
    """

    name: str
    code_bits: int
    rms: float
    codewords: Callable[[torch.device], torch.Tensor]
    nearest: Callable[[torch.Tensor], torch.Tensor]

    @property
    def num_codes(self) -> int:
        return 1 << self.code_bits

    @property
    def span(self) -> int:
        return 8

    @property
    def usual_scale(self) -> str:
        return "fp16"

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Scale every block to the root mean square of the codebook (`importance` is ignored); a block of zeros gets 0."""
        # Divided by the largest magnitude, so that no square is out of the range of float32.
        top = blocks.abs().amax(-1, keepdim=True)
        mean_square = (blocks / torch.where(top == 0, 1.0, top)).square().mean(-1, keepdim=True)
        return {"scale": top * mean_square.sqrt() / self.rms}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        scale = params["scale"]
        vectors = (values / torch.where(scale == 0, 1.0, scale)).reshape(-1, 8)
        codes = [self.nearest(piece) for piece in vectors.split(TOGETHER)]
        return torch.cat(codes).to(code_dtype(self.code_bits)).reshape(*values.shape[:-1], values.shape[-1] // 8)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        values = self.codewords(codes.device)[codes.int()]
        return values.reshape(*codes.shape[:-1], codes.shape[-1] * 8) * params["scale"]

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a vector."""


@cache
def _e8p_codewords(device: torch.device) -> Float[torch.Tensor, "65536 8"]:
    codes = torch.arange(1 << 16)
    magnitudes = _rows(torch.device("cpu"))[codes >> 8]
    bits = (codes[:, None] >> torch.tensor(SIGN_BIT)) & 1
    minus = bits.sum(-1) & 1
    bits[:, 0] ^= minus
    bits[:, 7] ^= (magnitudes.sum(-1) % 2).long()
    return (magnitudes * (1 - 2 * bits) + 0.25 - 0.5 * minus[:, None]).to(device)


@cache
def _rows(device: torch.device) -> Float[torch.Tensor, "256 8"]:
    """Return the magnitudes in the order of their codes."""
    short = [row for row in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(m * m for m in row) <= 10]
    padded = [tuple(1.5 if mask >> i & 1 else 0.5 for i in range(8)) for mask in NORM12]
    return torch.tensor(short + padded, device=device)


@cache
def _candidates(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return shapes [7, 8]; rows of norm 12 [29, 8]; where those are 1/2 [29, 3]; squared norms and odd sums of all 36; row of a pattern.

    A pattern is a base-3 number of eight digits, the first one highest: 0, 1, 2 for 1/2, 3/2, 5/2.
    """
    shapes, padded = torch.tensor(SHAPES, device=device), _rows(device)[-len(NORM12) :]
    halves = (padded == 0.5).nonzero()[:, 1].view(len(NORM12), 3)
    both = torch.cat([shapes, padded])
    row_of = torch.zeros(3**8, dtype=torch.int64, device=device)
    row_of[_pattern(_rows(device))] = torch.arange(256, device=device)
    return shapes, padded, halves, both.square().sum(-1), both.sum(-1).long() & 1, row_of


def _pattern(magnitudes: Float[torch.Tensor, "n 8"]) -> Int[torch.Tensor, " n"]:
    powers = torch.tensor([3**i for i in range(7, -1, -1)], device=magnitudes.device)
    return ((magnitudes - 0.5).long() * powers).sum(-1)


def _nearest_e8p(vectors: Float[torch.Tensor, "n 8"]) -> Int[torch.Tensor, " n"]:
    """Return the nearest code of every vector.

    For a shift and magnitudes p the best signs are those of u = vector - shift, at a squared distance of |u|^2 + |p|^2 - 2 <|u|, p>.
    If they break the parity, one sign must flip, which adds 4 |u_i| p_i. Of all permutations of one shape, the best puts the largest
    magnitude on the largest |u_i|; the sign to flip is then that of the smallest |u_i|, where p_i = 1/2. A row of norm 12 represents
    its own order only. Flipping a 3/2 there is never best: 1/2 is nearer to u than -3/2, keeps the parity, and is in the list.
    """
    shapes, padded, halves, norms, odd_sum, row_of = _candidates(vectors.device)
    u = torch.stack([vectors - 0.25, vectors + 0.25])  # [2, n, 8]
    size, negative = u.abs(), u < 0
    odd = negative.sum(-1) & 1
    ordered, order = size.sort(dim=-1, descending=True)
    gain = 2 * torch.cat([ordered @ shapes.T, size @ padded.T], dim=-1) - norms  # [2, n, 36]
    smallest = ordered[..., -1:].expand(-1, -1, len(SHAPES))
    turned = torch.cat([smallest, size[..., halves].amin(-1)], dim=-1)
    gain -= 2 * turned * (odd[..., None] ^ odd_sum)
    best, candidate = gain.max(-1)
    distance = u.square().sum(-1) - best
    minus = (distance[1] < distance[0]).long()

    def chosen(both: torch.Tensor) -> torch.Tensor:
        return torch.where(minus.bool().view(-1, *(1 for _ in both.shape[2:])), both[1], both[0])

    candidate, size, negative, order = chosen(candidate), chosen(size), chosen(negative), chosen(order)
    shape = shapes[candidate.clamp(max=len(SHAPES) - 1)]
    placed = torch.empty_like(shape).scatter_(-1, order, shape)
    is_shape = candidate < len(SHAPES)
    magnitudes = torch.where(is_shape[:, None], placed, padded[(candidate - len(SHAPES)).clamp(min=0)])
    wrong = (negative.sum(-1) & 1) ^ odd_sum[candidate]
    at = (size * magnitudes).argmin(-1, keepdim=True)
    bits = negative.long().scatter_add_(-1, at, wrong[:, None]) & 1
    bits[:, 7] ^= odd_sum[candidate]
    bits[:, 0] ^= minus
    return row_of[_pattern(magnitudes)] << 8 | (bits << torch.tensor(SIGN_BIT, device=bits.device)).sum(-1)


@cache
def _e81b_codewords(device: torch.device) -> Float[torch.Tensor, "256 8"]:
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(v) % 2 == 0 and sum(x * x for x in v) <= 2]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    far = torch.cat([2 * torch.eye(8), -2 * torch.eye(8)])[:-1]
    return torch.cat([torch.tensor(whole), torch.tensor(half), far]).to(device)


def _nearest_e81b(vectors: Float[torch.Tensor, "n 8"]) -> Int[torch.Tensor, " n"]:
    codewords = _e81b_codewords(vectors.device)
    return (vectors @ codewords.T - codewords.square().sum(-1) / 2).argmax(-1)


E8P = Lattice("e8p", 16, 1.03, _e8p_codewords, _nearest_e8p)
E81B = Lattice("e81b", 8, 0.6, _e81b_codewords, _nearest_e81b)
