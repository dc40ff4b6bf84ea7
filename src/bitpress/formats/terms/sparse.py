"""Sparse: single weights in half precision, in compressed rows (CSR), beside packed codes for all the others.

    row_start  int32  [out + 1]   number of weights in the rows before; the first is 0, the last is `count`
    column     uint16 [count]     their columns, rising within a row (int32 where in_features is beyond 65,536)
    value      fp16   [count]     the values added to the other terms

Worked example: [[0, 2, 0], [0, 0, 0], [1, 0, 3]] is row_start 0 1 1 3, column 1 0 2, value 2 1 3.

Source   Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation ...", section 4.2: a 16-bit value and a 16-bit column
         for every outlier, and a 32-bit running count for every row: 32 bits an outlier and a little more.
Differs  the codes below an outlier are free: with codes in place (as in SpQR), the value is their remainder; with the outliers
         set to zero before the codes are chosen, it is the whole weight.
Fails    NumericsError when an outlier is beyond the range of fp16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.format import Expected
from bitpress.formats.terms.specs import check_keys, check_rows, read_whole

__all__ = ["Sparse", "sparse"]

_LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Sparse:
    """`column` and `value` are left out where there is no weight at all: a file holds no empty tensors."""

    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]

    kind: ClassVar[str] = "sparse"

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> "Sparse":
        """Return a term without any weight."""
        return cls(shape, {"row_start": torch.zeros(shape[0] + 1, dtype=torch.int32, device=device)})

    @property
    def count(self) -> int:
        return self.tensors["value"].numel() if "value" in self.tensors else 0

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32, zero where nothing stands."""
        start = self.tensors["row_start"].long()
        w = torch.zeros(self.shape, dtype=torch.float32, device=start.device)
        if self.count:
            row = torch.repeat_interleave(torch.arange(self.shape[0], device=start.device), start.diff())
            w[row, self.tensors["column"].long()] = self.tensors["value"].float()
        return w

    def spec(self) -> dict[str, Any]:
        return {"count": self.count}

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that this specification implies."""
        check_keys("sparse", spec, {"count"})
        count = read_whole(spec, "count", 0, min(shape[0] * shape[1], _LARGEST_COUNT))
        tensors: Expected = {"row_start": (torch.int32, (shape[0] + 1,))}
        if count:
            tensors |= {"column": (_column_dtype(shape[1]), (count,)), "value": (torch.float16, (count,))}
        return tensors

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "Sparse":
        return cls(shape, tensors)

    def check(self) -> None:
        """Raise FormatError unless every row begins where the one before ends and every column is a new one of the weight."""
        start = self.tensors["row_start"].long()  # before any difference: int32 could wrap
        size = start.diff()
        if int(start[0]) != 0 or int(start[-1]) != self.count or bool((size < 0).any()):
            raise FormatError(f"row_start of a sparse term does not rise from 0 to {self.count}.")
        if not self.count:
            return
        column = self.tensors["column"].long()
        if bool((column < 0).any()) or bool((column >= self.shape[1]).any()):
            raise FormatError(f"a column of a sparse term is not one of the {self.shape[1]}.")
        row = torch.repeat_interleave(torch.arange(self.shape[0], device=size.device), size)
        if bool(((column.diff() <= 0) & (row.diff() == 0)).any()):
            raise FormatError("the columns of a sparse term do not rise within a row.")
        if not bool(torch.isfinite(self.tensors["value"]).all()):
            raise FormatError("a value of a sparse term is a NaN or an infinity.")

    def row_slice(self, start: int, stop: int) -> "Sparse":
        """Return rows `start` to `stop` as a separate term."""
        check_rows(self.shape[0], start, stop)
        row_start = self.tensors["row_start"][start : stop + 1]
        begin, end = int(row_start[0]), int(row_start[-1])
        sliced = {"row_start": row_start - begin}
        if end > begin:
            sliced |= {name: self.tensors[name][begin:end] for name in ("column", "value")}
        return Sparse((stop - start, self.shape[1]), sliced)

    @classmethod
    def stack_rows(cls, terms: Sequence["Sparse"]) -> "Sparse":
        """Stack terms of one width along the rows."""
        width, total = terms[0].shape[1], sum(t.count for t in terms)
        if any(t.shape[1] != width for t in terms):
            raise FormatError("only sparse terms of one width can be stacked.")
        if total > _LARGEST_COUNT:
            raise FormatError(f"{total} sparse weights are more than one term can hold; stack fewer.")
        starts, before = [torch.zeros_like(terms[0].tensors["row_start"][:1])], 0
        for term in terms:
            starts.append(term.tensors["row_start"][1:] + before)
            before += term.count
        joined = {"row_start": torch.cat(starts)}
        if total:
            full = [t.tensors for t in terms if t.count]
            # Not every operation of torch knows uint16: columns are joined as the bytes that they are.
            columns = torch.cat([t["column"].contiguous().view(torch.uint8) for t in full])
            joined |= {"column": columns.view(_column_dtype(width)), "value": torch.cat([t["value"] for t in full])}
        return cls((sum(t.shape[0] for t in terms), width), joined)


def sparse(w: Float[torch.Tensor, "out in"], mask: Shaped[torch.Tensor, "out in"]) -> Sparse:
    """Return a term of the weights under `mask`. Raises NumericsError if one of them is not finite in fp16."""
    if mask.dtype != torch.bool or mask.shape != w.shape:
        raise FormatError(f"the mask is {mask.dtype} {list(mask.shape)}; it must be bool {list(w.shape)}.")
    value = w[mask].to(torch.float16)
    if not bool(torch.isfinite(value).all()):
        raise NumericsError("a sparse weight is not finite in fp16.")
    if value.numel() > _LARGEST_COUNT:
        raise FormatError(f"{value.numel()} sparse weights are more than one term can hold.")
    size = mask.sum(1)
    row_start = torch.cat([torch.zeros_like(size[:1]), size.cumsum(0)]).to(torch.int32)
    tensors = {"row_start": row_start}
    if value.numel():
        column = mask.nonzero()[:, 1].to(torch.int32)
        tensors |= {"column": column.to(_column_dtype(w.shape[1])), "value": value}
    return Sparse((w.shape[0], w.shape[1]), tensors)


def _column_dtype(in_features: int) -> torch.dtype:
    return torch.uint16 if in_features <= 1 << 16 else torch.int32
