"""Additive codebooks: a vector of `span` weights is a sum of one word from each of several books, times the block's scale.

    w_hat = (words[0, code_0] + words[1, code_1] + ...) * scale        code = code_0 + code_1 << bits + code_2 << 2 bits ...

Source   Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization" (AQLM), and its public code:
         each book starts by k-means on the residual of the books before it, then codes and words are updated in turn.
Differs  the objective is the weights' error, weighted by importance, not the layer's output error: a grid has no gram. Words are
         learned with a beam search as in AQLM, but `encode` takes the nearest of all sums: codes have at most 16 bits in all, so the
         sums can be listed. Words are solved for in closed form for fixed codes, where AQLM uses Adam; a small ridge toward the
         previous words settles what the sums leave open (books can trade a constant). Scales are the root mean square of the block.
Cost     books * 2^bits * span float16 numbers a weight; an encode is a search among 2^(books * bits) words of `span` numbers.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native
from bitpress.errors import FormatError
from bitpress.formats.grids.clusters import cluster
from bitpress.formats.grids.codebook import look_up, scaled_vectors, training_vectors
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.grids.levels import root_mean_square
from bitpress.formats.grids.nearest import nearest, searched_natively
from bitpress.formats.layouts.dense import code_dtype

__all__ = ["AdditiveBook"]

# Rounds of k-means for a first guess, and rounds of searching and solving after it: 30 instead of 8 take less than 1% off the error.
FIRST_ROUNDS = 8
ROUNDS = 8
RIDGE = 1e-3
# Beginnings of a sum kept by a beam search, and scores computed at a time in it.
BEAM = 8
SCORES_TOGETHER = 1 << 18


@dataclass(frozen=True)
class AdditiveBook:
    """`books` books of 2^bits words of `span` weights, learned from the weight they are for."""

    books: int
    bits: int
    span: int
    usual_scale: str = "fp16"

    def __post_init__(self) -> None:
        if self.books < 2 or self.bits < 1 or self.books * self.bits > 16 or not 2 <= self.span <= 16:
            raise FormatError(
                f"{self.name}: an additive grid needs 2 or more books, at most 16 bits in all, and 2 to 16 weights per code."
            )

    @property
    def name(self) -> str:
        return f"aq{self.books}x{self.bits}x{self.span}"

    @property
    def code_bits(self) -> int:
        return self.books * self.bits

    @property
    def num_codes(self) -> int:
        return 1 << self.code_bits

    @property
    def params(self) -> tuple[StoredParam, ...]:
        shape = (self.books, 1 << self.bits, self.span)
        return StoredParam("scale", "scale"), StoredParam("words", "value", scope="tensor", shape=shape)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Set scales to the root mean square, and learn the words from an even sample of the vectors."""
        scale = root_mean_square(blocks)
        vectors, weights = training_vectors(blocks, scale, importance, self.span, self.books << self.bits)
        return {"scale": scale, "words": self._learned(vectors, weights)}

    def fit_blocks(
        self, blocks: Float[torch.Tensor, "blocks n"], whole: Params, importance: torch.Tensor | None = None
    ) -> Params:
        """Set scales to the root mean square."""
        return {"scale": root_mean_square(blocks)}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        vectors = scaled_vectors(values, params["scale"], self.span)
        if self.books == 2 and searched_natively(vectors, 1 << self.bits):
            parts = native.nearest_pairs(vectors, params["words"])
            codes = parts[0] + (parts[1] << self.bits)
        else:
            codes = nearest(vectors, self._sums(params["words"]))
        return codes.to(code_dtype(self.code_bits)).reshape(*values.shape[:-1], -1)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        parts = self._split(codes)
        values = look_up(params["words"][0], parts[0])
        for words, part in zip(params["words"][1:], parts[1:], strict=True):
            values += look_up(words, part)
        return values.mul_(params["scale"])

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a sum of words."""

    def _split(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """Return the code in every book."""
        return [(codes >> (self.bits * book)) & ((1 << self.bits) - 1) for book in range(self.books)]

    def _sums(self, words: Float[torch.Tensor, "books count span"]) -> Float[torch.Tensor, "all span"]:
        """List the sums of all codes in the order of the codes, added up in the order of `decode`."""
        sums = words[0]
        for book in words[1:]:
            sums = (book[:, None, :] + sums[None, :, :]).reshape(-1, self.span)
        return sums

    def _learned(
        self, vectors: Float[torch.Tensor, "n span"], weights: Float[torch.Tensor, "n per"]
    ) -> Float[torch.Tensor, "books count span"]:
        left, first = vectors, []
        for _ in range(self.books):
            first.append(cluster(left, weights, 1 << self.bits, FIRST_ROUNDS))
            left = left - first[-1][nearest(left, first[-1])]
        words = torch.stack(first)
        if not bool(left.any()):  # fewer vectors than words: nothing is left to learn
            return words
        for _ in range(ROUNDS):
            words = self._solved(vectors, weights, beam_search(vectors, words), words)
        return words

    def _solved(
        self,
        vectors: Float[torch.Tensor, "n span"],
        weights: Float[torch.Tensor, "n per"],
        codes: Int[torch.Tensor, "books n"],
        words: Float[torch.Tensor, "books count span"],
    ) -> Float[torch.Tensor, "books count span"]:
        """Return the words with the least weighted squared error for these codes."""
        count = 1 << self.bits
        left = vectors - sum(words[book][codes[book]] for book in range(self.books))
        change = torch.empty(self.books * count, self.span, dtype=torch.float64, device=words.device)
        # One system for all numbers of a word where they weigh the same, one for each where they do not.
        for i in range(weights.shape[1]):
            weight = weights[:, i].double()
            rows = [
                torch.cat([torch.bincount(a * count + b, weight, count * count).view(count, count) for b in codes], dim=1)
                for a in codes
            ]
            normal = torch.cat(rows)
            columns = slice(None) if weights.shape[1] == 1 else slice(i, i + 1)
            target = weight[:, None] * left[:, columns]
            sums = [target.new_zeros(count, target.shape[1]).index_add_(0, a, target) for a in codes]
            normal.diagonal().add_(RIDGE * normal.diagonal().mean() + torch.finfo(torch.float64).tiny)
            change[:, columns] = torch.linalg.solve(normal, torch.cat(sums))
        return words + change.view_as(words).float()


def beam_search(
    vectors: Float[torch.Tensor, "n span"], words: Float[torch.Tensor, "books count span"], width: int = BEAM
) -> Int[torch.Tensor, "books n"]:
    """Return codes whose words add up to nearly each vector: book by book, the `width` best beginnings of a sum are kept."""
    if searched_natively(vectors, words.shape[1]):
        return native.beam_search(vectors, words, width)
    kept = width if len(words) > 2 else 1  # beginnings that are scored against a whole book, but for the last one
    together = max(SCORES_TOGETHER // (kept * words.shape[1]), 1)
    return torch.cat([_beam_search(part, words, width) for part in vectors.split(together)], dim=1)


def _beam_search(vectors: torch.Tensor, words: torch.Tensor, width: int) -> torch.Tensor:
    count, span = words.shape[1:]
    left = vectors[:, None, :]  # [n, kept, span]
    codes = torch.empty(0, len(vectors), 1, dtype=torch.int64, device=vectors.device)
    for book in words[:-1]:
        # |left - word|^2, the smallest of all that are kept times all words.
        squares = left.square().sum(-1, keepdim=True) + book.square().sum(-1)
        error = torch.baddbmm(squares, left, book.T.expand(len(left), -1, -1), alpha=-2).flatten(1)
        best = error.topk(min(width, error.shape[1]), largest=False).indices
        kept, code = best // count, best % count
        codes = torch.cat([codes.gather(2, kept.expand(len(codes), -1, -1)), code[None]])
        left = left.gather(1, kept[..., None].expand(-1, -1, span)) - book[code]
    # Of the last book only each beginning's nearest word can be in the best sum.
    code = nearest(left.reshape(-1, span), words[-1]).view(left.shape[:2])
    left = left - words[-1][code]
    codes = torch.cat([codes.expand(-1, -1, code.shape[1]), code[None]])
    return codes[:, torch.arange(len(vectors), device=vectors.device), left.square().sum(-1).argmin(-1)]
