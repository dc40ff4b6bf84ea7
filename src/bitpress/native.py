"""Typed functions of the native library, if it could be built.

Every function has a reference in torch that defines its result; callers use the reference if `available()` is False. Tensors are
on the CPU and contiguous; results do not depend on the number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from jaxtyping import Integer as Int

from bitpress.library import available, built_library, chosen_path, code_paths, features, library

__all__ = [
    "EvenLevels",
    "LevelTable",
    "Steps",
    "add_gram_",
    "add_product_",
    "available",
    "beam_search",
    "chosen_path",
    "code_paths",
    "compare_rows",
    "decode_affine",
    "decode_levels",
    "encode_affine",
    "encode_levels",
    "encode_trellis",
    "features",
    "gram_size",
    "library",
    "nearest_pairs",
    "pack_dense",
    "round_columns_",
    "search_ranges",
    "search_scales",
    "serves",
    "unpack_dense",
]


# The kinds of scales that `search_ranges` knows, by its numbers for them.
SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
IN_STEPS = 3


@dataclass(frozen=True)
class Steps:
    """Scales that are integer multiples, 1 to `most`, of one step per block; all are 0 if the step is."""

    step: Float[torch.Tensor, "blocks 1"]
    most: int


@dataclass(frozen=True)
class EvenLevels:
    """Levels `(code - zero) * scale`, codes 0 to `top`; one zero point per group and row, or one for all."""

    zero: Float[torch.Tensor, "groups rows"] | float
    top: int


@dataclass(frozen=True)
class LevelTable:
    """At most 256 levels in rising order, times a scale: a value above k `boundaries` has the k-th level, whose code is `code_of[k]`.

    `zeros` are the codes of 0 and of negative 0, which values with their sign bit set get.
    The library refuses a table whose three lengths do not belong together.
    """

    boundaries: Float[torch.Tensor, " boundaries"]
    levels: Float[torch.Tensor, " levels"]
    code_of: UInt8[torch.Tensor, " codes"]
    zeros: tuple[int, int] | None

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Return the table as arguments of the library."""
        return (self.boundaries, self.levels, self.code_of, *(self.zeros or (-1, -1)))


def serves(values: torch.Tensor, scale: torch.Tensor) -> bool:
    """Return whether the block functions below accept these: `[blocks, n]` on the CPU without a gradient, one scale per block, and native
    code built."""
    plain = values.device.type == "cpu" and not (values.requires_grad or scale.requires_grad)
    return plain and values.ndim == 2 and scale.shape == (values.shape[0], 1) and available()


def round_columns_(
    w: Float[torch.Tensor, "cols rows"],
    factor: Float[torch.Tensor, "cols cols"],
    scale: Float[torch.Tensor, "groups rows"],
    levels: EvenLevels | LevelTable,
    group: Int[torch.Tensor, " cols"],
    least: Float[torch.Tensor, "cols rows"] | None = None,
) -> tuple[UInt8[torch.Tensor, "cols rows"], Float[torch.Tensor, "cols rows"], Float[torch.Tensor, "cols rows"] | None]:
    """Round columns in order, each error fed to the columns after it in `w`; return codes, errors and outliers.

    `group` names each column's row of parameters. Errors larger than `least` are stored as outliers in half precision,
    and only their remainder is fed on; without `least` there are no outliers.
    """
    codes = torch.empty(w.shape, dtype=torch.uint8)
    errors = torch.empty_like(w)
    even = levels if isinstance(levels, EvenLevels) else EvenLevels(0.0, 0)
    stored, constant = (even.zero, 0.0) if isinstance(even.zero, torch.Tensor) else (None, float(even.zero))
    table = levels.parts() if isinstance(levels, LevelTable) else (None, None, None, -1, -1)
    kept = None if least is None else torch.empty_like(w)
    threads = torch.get_num_threads()
    built_library().round_columns(
        w, codes, errors, factor, scale, stored, constant, even.top, *table, group, least, kept, threads
    )
    return codes, errors, kept


def encode_trellis(
    values: Float[torch.Tensor, "sequences length"],
    weights: Float[torch.Tensor, "sequences length"] | None,
    state_bits: int,
    shifts: Int[torch.Tensor, " period"],
    levels: Float[torch.Tensor, " states"],
) -> UInt8[torch.Tensor, "sequences length"]:
    """Return the new bits of every value on the path with the least squared error (weighted by `weights`), sequence by sequence.

    `formats.grids.trellis` describes the path; `shifts` are int32, the bits that a value adds, repeated along the sequence.
    """
    codes = torch.empty(values.shape, dtype=torch.uint8)
    built_library().encode_trellis(values, weights, codes, state_bits, shifts, levels, torch.get_num_threads())
    return codes


def gram_size(in_features: int) -> int:
    """Rows and columns of the buffer that `add_gram_` and `add_product_` need: whole tiles of 32."""
    return -(-in_features // 32) * 32


def add_gram_(gram: Float[torch.Tensor, "padded padded"], x: torch.Tensor) -> None:
    """Add x.T @ x on and above the diagonal; `x` is bf16 `[tokens, in]`. Entries below the diagonal are undefined."""
    built_library().add_gram(gram, x.view(torch.int16), torch.get_num_threads())


def add_product_(total: Float[torch.Tensor, "padded padded"], a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a.T @ b of two matrices; both are bf16 `[tokens, in]`."""
    built_library().add_product(total, a.view(torch.int16), b.view(torch.int16), torch.get_num_threads())


def encode_affine(
    values: Float[torch.Tensor, "blocks n"],
    scale: Float[torch.Tensor, "blocks 1"],
    zero: Float[torch.Tensor, "blocks 1"] | float,
    top: int,
) -> UInt8[torch.Tensor, "blocks n"]:
    """Return `round(values / scale) + zero`, halves to even, clamped to 0 .. top; a scale of 0 divides as 1."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    stored, constant = _zero(zero)
    built_library().encode_affine(values.contiguous(), codes, _vector(scale), stored, constant, top, torch.get_num_threads())
    return codes


def search_ranges(
    values: Float[torch.Tensor, "blocks n"],
    importance: Float[torch.Tensor, "blocks n"] | None,
    ratios: Sequence[float],
    top: int,
    *,
    with_zero: bool,
    kept: torch.dtype | Steps,
) -> tuple[Float[torch.Tensor, "blocks 1"], Float[torch.Tensor, "blocks 1"] | None, bool]:
    """Return the scale and the zero point of every block, for the ratio of its range with the least squared error.

    Levels are `(code - zero) * scale`, codes 0 to `top`; scales are rounded to `kept`, fp16, bf16, float32 or steps. The third result
    says whether every scale that was tried is in the range of `kept`.
    """
    scale = torch.empty(values.shape[0])
    zero = torch.empty(values.shape[0]) if with_zero else None
    weights = None if importance is None else importance.contiguous()
    tried = torch.tensor(ratios, dtype=torch.float32)
    kind, steps, most = (IN_STEPS, _vector(kept.step), kept.most) if isinstance(kept, Steps) else (SCALE_TYPES[kept], None, 0)
    threads = torch.get_num_threads()
    good = built_library().search_ranges(values.contiguous(), weights, tried, top, scale, zero, kind, steps, most, threads)
    return scale[:, None], None if zero is None else zero[:, None], good


def search_scales(
    values: Float[torch.Tensor, "blocks n"],
    importance: Float[torch.Tensor, "blocks n"] | None,
    trials: Float[torch.Tensor, "trials blocks"],
    table: LevelTable,
) -> Float[torch.Tensor, "blocks 1"]:
    """Return the scale of every block, of its trials, with the least squared error; the first of equals."""
    scale = torch.empty(values.shape[0])
    weights = None if importance is None else importance.contiguous()
    threads = torch.get_num_threads()
    built_library().search_scales(values.contiguous(), weights, trials.contiguous(), *table.parts(), scale, threads)
    return scale[:, None]


def beam_search(
    vectors: Float[torch.Tensor, "n span"], words: Float[torch.Tensor, "books count span"], width: int
) -> Int[torch.Tensor, "books n"]:
    """Return the words, one of each book, whose sum is close to each vector; the `width` best partial sums are kept."""
    codes = torch.empty(words.shape[0], vectors.shape[0], dtype=torch.int64)
    built_library().beam_search(vectors.contiguous(), words.contiguous(), width, codes, torch.get_num_threads())
    return codes


def nearest_pairs(
    vectors: Float[torch.Tensor, "n span"], words: Float[torch.Tensor, "2 count span"]
) -> Int[torch.Tensor, "2 n"]:
    """Return the words of two books whose sum is the nearest of all sums to each vector."""
    codes = torch.empty(2, vectors.shape[0], dtype=torch.int64)
    built_library().nearest_pairs(vectors.contiguous(), words.contiguous(), codes, torch.get_num_threads())
    return codes


def decode_affine(
    codes: UInt8[torch.Tensor, "blocks n"],
    scale: Float[torch.Tensor, "blocks 1"],
    zero: Float[torch.Tensor, "blocks 1"] | float,
) -> Float[torch.Tensor, "blocks n"]:
    """Return `(codes - zero) * scale`."""
    values = torch.empty(codes.shape)
    stored, constant = _zero(zero)
    built_library().decode_affine(codes.contiguous(), values, _vector(scale), stored, constant, torch.get_num_threads())
    return values


def encode_levels(
    values: Float[torch.Tensor, "blocks n"], scale: Float[torch.Tensor, "blocks 1"], table: LevelTable
) -> UInt8[torch.Tensor, "blocks n"]:
    """Return the codes of the levels nearest to `values / scale`; a scale of 0 divides as 1."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    built_library().encode_levels(values.contiguous(), codes, _vector(scale), *table.parts(), torch.get_num_threads())
    return codes


def decode_levels(
    codes: UInt8[torch.Tensor, "blocks n"], scale: Float[torch.Tensor, "blocks 1"], table: Float[torch.Tensor, " 256"]
) -> Float[torch.Tensor, "blocks n"]:
    """Return `table[codes] * scale`."""
    values = torch.empty(codes.shape)
    built_library().decode_levels(codes.contiguous(), values, _vector(scale), table, torch.get_num_threads())
    return values


def pack_dense(codes: UInt8[torch.Tensor, "rows count"], bits: int) -> UInt8[torch.Tensor, "rows bytes"]:
    """Pack codes of 1 to 8 bits side by side, row by row."""
    packed = torch.empty(codes.shape[0], -(-codes.shape[1] * bits // 8), dtype=torch.uint8)
    built_library().pack_dense(codes.contiguous(), packed, bits, torch.get_num_threads())
    return packed


def unpack_dense(packed: UInt8[torch.Tensor, "rows bytes"], bits: int, count: int) -> UInt8[torch.Tensor, "rows count"]:
    """Return the first `count` codes of every row."""
    codes = torch.empty(packed.shape[0], count, dtype=torch.uint8)
    built_library().unpack_dense(packed.contiguous(), codes, bits, torch.get_num_threads())
    return codes


def _vector(scale: torch.Tensor) -> torch.Tensor:
    return scale.reshape(-1).contiguous()


def _zero(zero: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    return (_vector(zero), 0.0) if isinstance(zero, torch.Tensor) else (None, float(zero))


def compare_rows(
    p: Float[torch.Tensor, "rows vocabulary"], q: Float[torch.Tensor, "rows vocabulary"], following: Int[torch.Tensor, " rows"]
) -> tuple[Float[torch.Tensor, "4 rows"], int]:
    """Return KL(p, q), top token agreement, and the negative log-likelihoods of `following` (-1: none) for every row, in nats.

    Logits are float32 or bf16, both of one type. The second result says which are not finite: 1 for p, 2 for q, 3 for both, 0 for neither.
    """
    figures = torch.empty((p.shape[0], 4), dtype=torch.float64)
    p, q = (x.contiguous().view(torch.int16) if x.dtype == torch.bfloat16 else x.contiguous() for x in (p, q))
    bad = built_library().compare_rows(p, q, following, figures, torch.get_num_threads())
    return figures.T, bad
