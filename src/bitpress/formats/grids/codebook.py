"""Codebooks: one code of `bits` bits stands for a vector of `span` weights, a word of a book times the block's scale.

    w_hat[span * i : span * (i + 1)] = words[codes[i]] * scale

The scale is the root mean square of the block, so that words are made for weights of variance 1 and blocks of different size share
them. A `FixedBook` is a constant of the grid; a `LearnedBook` is clustered from the weight itself and stored with it once, as float16.

Words are learned by weighted k-means (`formats.grids.clusters`); an error weighs its importance times the square of the scale.

Cost     a learned book takes 2^bits * span float16 numbers a weight: 2 KiB for vq8x4, 1 MiB for vq16x8.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.grids.clusters import cluster, spread_sample
from bitpress.formats.grids.grid import Params, StoredParam
from bitpress.formats.grids.levels import root_mean_square
from bitpress.formats.grids.nearest import nearest
from bitpress.formats.layouts.dense import code_dtype

__all__ = ["FixedBook", "LearnedBook", "look_up", "scaled_vectors", "training_vectors"]

# Training vectors, at least and per word; rounds of learning, at least and at most; and the number of scores that the rounds in
# between may compute.
VECTORS = 1 << 15
VECTORS_PER_WORD = 32
FEW_ROUNDS, MANY_ROUNDS = 12, 100
SCORES = 1 << 29


@dataclass(frozen=True)
class FixedBook:
    """A table of words `[count, span]` for weights of variance 1."""

    name: str
    # Not part of the hash, which every look-up of the cached table computes; equality compares it.
    words: tuple[tuple[float, ...], ...] = field(repr=False, hash=False)
    usual_scale: str = "fp16"

    def __post_init__(self) -> None:
        if not 2 <= len(self.words) <= 1 << 16 or len({len(word) for word in self.words}) != 1:
            raise FormatError(f"{self.name}: a book must hold 2 to 65,536 words of one length.")

    @property
    def code_bits(self) -> int:
        return (len(self.words) - 1).bit_length()

    @property
    def num_codes(self) -> int:
        return len(self.words)

    @property
    def span(self) -> int:
        return len(self.words[0])

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return (StoredParam("scale", "scale"),)

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Set scales to the root mean square (`importance` is ignored)."""
        return {"scale": root_mean_square(blocks)}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        vectors = scaled_vectors(values, params["scale"], self.span)
        codes = nearest(vectors, _table(self, values.device)).to(code_dtype(self.code_bits))
        return codes.reshape(*values.shape[:-1], -1)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        return look_up(_table(self, codes.device), codes).mul_(params["scale"])

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Raise FormatError for a code without a word."""
        if bool((codes.int() >= len(self.words)).any()):
            raise FormatError(f"{self.name}: a code is {int(codes.max())}, but there are only {len(self.words)} words.")


@dataclass(frozen=True)
class LearnedBook:
    """2^bits words of `span` weights, learned from the weight they are for."""

    bits: int
    span: int
    usual_scale: str = "fp16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16 or not 2 <= self.span <= 16:
            raise FormatError(f"{self.name}: a learned book needs codes of 1 to 16 bits for 2 to 16 weights.")

    @property
    def name(self) -> str:
        return f"vq{self.bits}x{self.span}"

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def num_codes(self) -> int:
        return 1 << self.bits

    @property
    def params(self) -> tuple[StoredParam, ...]:
        return StoredParam("scale", "scale"), StoredParam("words", "value", scope="tensor", shape=(1 << self.bits, self.span))

    def fit(self, blocks: Float[torch.Tensor, "blocks n"], importance: torch.Tensor | None = None) -> Params:
        """Set scales to the root mean square, and learn the words from an even sample of the vectors."""
        scale = root_mean_square(blocks)
        vectors, weights = training_vectors(blocks, scale, importance, self.span, 1 << self.bits)
        rounds = min(max(SCORES // (len(vectors) << self.bits), FEW_ROUNDS), MANY_ROUNDS)
        return {"scale": scale, "words": cluster(vectors, weights, 1 << self.bits, rounds)}

    def fit_blocks(
        self, blocks: Float[torch.Tensor, "blocks n"], whole: Params, importance: torch.Tensor | None = None
    ) -> Params:
        """Set scales to the root mean square."""
        return {"scale": root_mean_square(blocks)}

    def encode(self, values: Float[torch.Tensor, "... n"], params: Params) -> Int[torch.Tensor, "... codes"]:
        vectors = scaled_vectors(values, params["scale"], self.span)
        return nearest(vectors, params["words"]).to(code_dtype(self.bits)).reshape(*values.shape[:-1], -1)

    def decode(self, codes: Int[torch.Tensor, "... codes"], params: Params) -> Float[torch.Tensor, "... n"]:
        return look_up(params["words"], codes).mul_(params["scale"])

    def check(self, codes: Int[torch.Tensor, "..."]) -> None:
        """Accept every code: each is a word."""


def scaled_vectors(values: Float[torch.Tensor, "... n"], scale: torch.Tensor, span: int) -> Float[torch.Tensor, "vectors span"]:
    """Return the vectors of `span` weights divided by their scale; a scale of 0 (a block of zeros) divides as 1."""
    return (values / torch.where(scale == 0, 1.0, scale)).reshape(-1, span)


def training_vectors(
    blocks: Float[torch.Tensor, "blocks n"], scale: torch.Tensor, importance: torch.Tensor | None, span: int, words: int
) -> tuple[Float[torch.Tensor, "sample span"], Float[torch.Tensor, "sample per"]]:
    """Return an even sample of the scaled vectors, enough for `words` words, and the weight of an error in them.

    The weight is the importance times the square of the scale: one per vector, or one per number if there is an importance.
    """
    at = spread_sample(blocks.numel() // span, max(VECTORS, VECTORS_PER_WORD * words)).to(blocks.device)
    top = scale.max()
    relative = (scale / torch.where(top > 0, top, 1.0)).square_()  # so that small weights do not vanish when squared
    if importance is None:
        weights = relative.expand(-1, blocks.shape[1] // span).reshape(-1, 1)[at]
    else:
        weights = (importance * relative).reshape(-1, span)[at]
    return scaled_vectors(blocks, scale, span)[at], weights


def look_up(words: Float[torch.Tensor, "count span"], codes: Int[torch.Tensor, "... codes"]) -> Float[torch.Tensor, "... n"]:
    """Return the words of codes side by side, in a new tensor."""
    return words.index_select(0, codes.reshape(-1).int()).reshape(*codes.shape[:-1], -1)


@cache
def _table(book: FixedBook, device: torch.device) -> torch.Tensor:
    return torch.tensor(book.words, dtype=torch.float32, device=device)
