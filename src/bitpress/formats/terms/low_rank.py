"""LowRank: a product of two thin factors, for example the error of packed codes.

    w_hat = a b          a [out, rank]    b [rank, in]          (b [parts * rank, in] for a stack: every part its own pair)

Source   The term of LQER, of ZeroQuant-V2's low-rank compensation and of SVDQuant. The nearest matrix of a rank is the
         truncated singular value decomposition; a method with other weights of errors passes its own factors to `LowRank.store`.
Differs  the singular values all go into `b`: the columns of `a` then have length 1, a row of `a` holds numbers of one size, and
         8 bits cost every component the same small part of itself. A split by square roots would drown the weak ones in
         each row.
Needs    a residual that is finite.        Cost  O(out * in * min(out, in)) time to make; rank * (out + in) numbers stored.
         Factors too small for fp16 are kept in bf16.
Fails    NumericsError when a factor is beyond the range of its type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.format import Expected
from bitpress.formats.table import stored_format
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.specs import check_keys, covered, read_name, read_parts, read_whole, with_parts

__all__ = ["LowRank", "low_rank"]

_PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LowRank:
    """`dtype` is fp16, bf16 or the name of a number format that both factors are packed in, for example int8-row."""

    shape: tuple[int, int]
    rank: int
    dtype: str
    tensors: Mapping[str, torch.Tensor]
    parts: int = 1

    kind: ClassVar[str] = "low_rank"

    @classmethod
    def store(cls, a: Float[torch.Tensor, "out rank"], b: Float[torch.Tensor, "rank in"], dtype: str = "fp16") -> "LowRank":
        """Return a term of two factors, rounded to their type."""
        shape, rank = (a.shape[0], b.shape[1]), a.shape[1]
        cls.expected({"rank": rank, "dtype": dtype}, shape)
        if dtype == "fp16" and any(_vanishes(factor) for factor in (a, b)):
            dtype = "bf16"  # of the same bytes, and of the range of float32
        tensors: dict[str, torch.Tensor] = {}
        for name, factor in (("a", a), ("b", b)):
            if dtype in _PLAIN:
                tensors[name] = factor.to(_PLAIN[dtype]).clone(memory_format=torch.contiguous_format)
                if not bool(torch.isfinite(tensors[name]).all()):
                    raise NumericsError(f"a factor of a low-rank term is out of the range of {dtype}; use bf16.")
            else:
                fmt = stored_format(dtype)
                params = fmt.fit(factor)
                packed = Packed.pack(fmt, fmt.encode(factor, params), params)
                tensors |= {f"{name}.{part}": t for part, t in packed.tensors.items()}
        return cls(shape, rank, dtype, tensors)

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the product in float32."""
        a, b = self.factors()
        each = a.reshape(self.parts, -1, self.rank) @ b.reshape(self.parts, self.rank, -1)
        return each.reshape(self.shape)

    def factors(self) -> tuple[Float[torch.Tensor, "out rank"], Float[torch.Tensor, "{self.parts}*rank in"]]:
        """Return both factors in float32."""
        a, b = (self._packed(name).dequantize() if self._is_packed else self.tensors[name].float() for name in "ab")
        return a, b

    def packed_factors(self) -> tuple[Packed, Packed] | None:
        """Return both factors as codes, or None for those in 16 bits."""
        return (self._packed("a"), self._packed("b")) if self._is_packed else None

    def spec(self) -> dict[str, Any]:
        return with_parts({"rank": self.rank, "dtype": self.dtype}, self.parts)

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that this specification implies."""
        check_keys("low_rank", spec, {"rank", "dtype"}, {"parts"})
        dtype, parts = read_name(spec, "dtype"), read_parts(spec, shape[0])
        rank = read_whole(spec, "rank", 1, shape[1])  # some rows of a term may be fewer than its rank
        tensors: Expected = {}
        for name, factor in (("a", (shape[0], rank)), ("b", (parts * rank, shape[1]))):
            if dtype in _PLAIN:
                tensors[name] = (_PLAIN[dtype], factor)
            else:
                tensors |= {f"{name}.{p}": t for p, t in Packed.expected(_packed_spec(dtype, parts), factor).items()}
        return tensors

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "LowRank":
        return cls(shape, spec["rank"], spec["dtype"], tensors, read_parts(spec, shape[0]))

    def check(self) -> None:
        """Raise FormatError when a factor is not finite."""
        for name in "ab":
            if self._is_packed:
                self._packed(name).check()
            elif not bool(torch.isfinite(self.tensors[name]).all()):
                raise FormatError(f"the factor {name} of a low-rank term holds a NaN or an infinity.")

    def row_slice(self, start: int, stop: int) -> "LowRank":
        """Return rows `start` to `stop`: some of one part, or whole parts."""
        first, last = covered(self.shape[0], self.parts, start, stop)
        rows = {"a": (start, stop), "b": (first * self.rank, last * self.rank)}
        tensors: dict[str, torch.Tensor] = {}
        for name, (begin, end) in rows.items():
            if self._is_packed:
                sliced = self._packed(name).row_slice(begin, end)
                tensors |= {f"{name}.{part}": t for part, t in sliced.tensors.items()}
            else:
                tensors[name] = self.tensors[name][begin:end]
        return LowRank((stop - start, self.shape[1]), self.rank, self.dtype, tensors, last - first)

    @classmethod
    def stack_rows(cls, terms: Sequence["LowRank"]) -> "LowRank":
        """Stack terms of one shape, rank and type along the rows; each keeps its own pair."""
        first = terms[0]
        if any((t.shape, t.rank, t.dtype, t.parts) != (first.shape, first.rank, first.dtype, first.parts) for t in terms):
            raise FormatError("only low-rank terms of one shape, one rank and one type can be stacked.")
        joined = {name: torch.cat([t.tensors[name] for t in terms]) for name in first.tensors}
        return cls((first.shape[0] * len(terms), first.shape[1]), first.rank, first.dtype, joined, first.parts * len(terms))

    @property
    def _is_packed(self) -> bool:
        return self.dtype not in _PLAIN

    def _packed(self, name: str) -> Packed:
        own = {n.removeprefix(f"{name}."): t for n, t in self.tensors.items() if n.startswith(f"{name}.")}
        shape = (self.shape[0], self.rank) if name == "a" else (self.parts * self.rank, self.shape[1])
        return Packed.build(_packed_spec(self.dtype, self.parts), shape, own)


def _vanishes(factor: torch.Tensor) -> bool:
    """Return whether float16 is too coarse for a small factor: more than 1/256 of its energy would be lost."""
    largest = factor.abs().max()
    if not float(largest) or float(largest) > torch.finfo(torch.float16).max:
        return False
    lost = (factor - factor.half().float()) / largest
    return float(lost.square().sum()) * 256 > float((factor / largest).square().sum())


def low_rank(residual: Float[torch.Tensor, "out in"], rank: int, dtype: str = "fp16") -> LowRank:
    """Return the nearest matrix of a rank to `residual`, by truncated singular value decomposition.

    Raises NumericsError when the residual is not finite or a factor does not fit its type, FormatError for a rank that
    the shape does not have.
    """
    if not bool(torch.isfinite(residual).all()):
        raise NumericsError("the residual holds a NaN or an infinity.")
    if not 1 <= rank <= min(residual.shape):
        raise FormatError(
            f"rank is {rank!r}, but must be 1 to {min(residual.shape)} for a weight of shape {list(residual.shape)}."
        )
    LowRank.expected({"rank": rank, "dtype": dtype}, (residual.shape[0], residual.shape[1]))  # before the long part
    u, s, v = torch.linalg.svd(residual.float(), full_matrices=False)
    return LowRank.store(u[:, :rank], s[:rank, None] * v[:rank], dtype)


def _packed_spec(dtype: str, parts: int) -> dict[str, Any]:
    """Name the format of a factor, and its parts where the format ties rows together."""
    return with_parts({"format": dtype}, 1 if stored_format(dtype).rows_apart else parts)
