"""Kept: some columns or rows of a weight in a separate number format, chosen by a one-dimensional mask; zero elsewhere.

    mask    uint8 [parts, ceil(in / 8)] or [1, ceil(out / 8)]     one bit a column or row, the first one least significant
    kept.*  a packed weight [out, count] or [count, in]           the kept ones, without gaps, in order

Source   Zhao et al. 2025, "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization ...": salient input
         channels in 4 bits, the others binary, for 0.0002 bits a weight of mask (here 1 / out: 0.00024 at 4,096 rows).
Differs  rows too. A bit mask instead of a list of indices: every set has one encoding, and from one column in sixteen on it is
         shorter. Terms add up: either the other term has a level at zero and holds zeros here (`keep_columns` returns the weight
         to pack), or it is a `Kept` of the other columns, since binary codes have no zero and absent columns cost nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.format import Expected, Format
from bitpress.formats.layouts import dense as dense
from bitpress.formats.table import stored_format
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.specs import check_keys, covered, read_name, read_parts, read_whole, with_parts

__all__ = ["Kept", "keep_columns", "keep_rows"]

Axis = Literal["columns", "rows"]


@dataclass(frozen=True)
class Kept:
    """`count` columns (of every part of a stack) or rows; with a count of 0 there are no tensors, since a file holds no empty ones."""

    format: Format
    axis: Axis
    shape: tuple[int, int]
    count: int
    tensors: Mapping[str, torch.Tensor]
    parts: int = 1

    kind: ClassVar[str] = "kept"

    @classmethod
    def place(cls, packed: Packed, axis: Axis, chosen: Bool[torch.Tensor, "*parts n"]) -> "Kept":
        """Return packed columns or rows at the places of `chosen`, in a weight that is zero elsewhere.

        With an axis of parts, `chosen` holds the columns of every part, as many in each; a part is some rows, down to one.
        """
        chosen = chosen if chosen.ndim == 2 else chosen[None]
        count, n = int(chosen[0].sum()), chosen.shape[1]
        assert packed.parts == 1
        assert packed.shape[1 if axis == "columns" else 0] == count
        shape = (packed.shape[0], n) if axis == "columns" else (n, packed.shape[1])
        return cls(packed.format, axis, shape, count, _tensors(_pack(chosen), packed), len(chosen))

    @property
    def packed(self) -> Packed:
        """The kept columns or rows, without gaps. Only if there are any."""
        own = {n.removeprefix("kept."): t for n, t in self.tensors.items() if n.startswith("kept.")}
        shape = (self.shape[0], self.count) if self.axis == "columns" else (self.count, self.shape[1])
        return Packed.build(_packed_spec(self.format, self.parts), shape, own)

    def chosen(self) -> Bool[torch.Tensor, "parts n"]:
        """Return a mask of the kept columns (of every part) or rows. Only if there are any."""
        return _unpack(self.tensors["mask"], self.shape[1 if self.axis == "columns" else 0])

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32, zero outside of the kept columns or rows."""
        if not self.count:
            return torch.zeros(self.shape)
        values, chosen = self.packed.dequantize(), self.chosen()
        w = torch.zeros(self.shape, dtype=torch.float32, device=values.device)
        if self.axis == "rows":
            w[chosen[0]] = values
            return w
        at = chosen.nonzero()[:, 1].view(self.parts, 1, self.count).expand(-1, self.shape[0] // self.parts, -1)
        return w.view(self.parts, -1, self.shape[1]).scatter_(2, at, values.view(at.shape)).view(self.shape)

    def spec(self) -> dict[str, Any]:
        return with_parts({"axis": self.axis, "count": self.count, "format": self.format.name}, self.parts)

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that this specification implies."""
        check_keys("kept", spec, {"axis", "count", "format"}, {"parts"})
        fmt, parts = stored_format(read_name(spec, "format")), read_parts(spec, shape[0])
        if spec["axis"] not in ("columns", "rows"):
            raise FormatError(f"axis is {spec['axis']!r}; it must be columns or rows.")
        by_columns = spec["axis"] == "columns"
        if parts > 1 and not by_columns:
            raise FormatError("kept rows have one mask, so they cannot have parts.")
        n = shape[1] if by_columns else shape[0]
        count = read_whole(spec, "count", 0, n)
        if not count:
            return {}
        tensors: Expected = {"mask": (torch.uint8, (parts, dense.row_bytes(n, 1)))}
        kept = (shape[0], count) if by_columns else (count, shape[1])
        return tensors | {f"kept.{name}": t for name, t in Packed.expected(_packed_spec(fmt, parts), kept).items()}

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "Kept":
        fmt = stored_format(spec["format"])
        return cls(fmt, spec["axis"], shape, spec["count"], tensors, read_parts(spec, shape[0]))

    def check(self) -> None:
        """Raise FormatError unless the mask holds `count` bits, none beyond its end, and the packed weight is sound."""
        if not self.count:
            return
        chosen = self.chosen()
        if bool((chosen.sum(1) != self.count).any()):
            raise FormatError(f"the mask of a kept term does not hold {self.count} {self.axis}.")
        if not torch.equal(_pack(chosen), self.tensors["mask"]):
            raise FormatError(f"the mask of a kept term holds {self.axis} beyond the last one.")
        self.packed.check()

    def row_slice(self, start: int, stop: int) -> "Kept":
        """Return rows `start` to `stop`: for kept columns, some rows of one part or whole parts."""
        shape = (stop - start, self.shape[1])
        first, last = covered(self.shape[0], self.parts, start, stop)
        if not self.count:
            return Kept(self.format, self.axis, shape, 0, {}, last - first)
        if self.axis == "columns":
            tensors = _tensors(self.tensors["mask"][first:last], self.packed.row_slice(start, stop))
            return Kept(self.format, self.axis, shape, self.count, tensors, last - first)
        chosen = self.chosen()[:, start:stop]
        before, count = int(self.chosen()[:, :start].sum()), int(chosen.sum())
        tensors = _tensors(_pack(chosen), self.packed.row_slice(before, before + count)) if count else {}
        return Kept(self.format, self.axis, shape, count, tensors)

    @classmethod
    def stack_rows(cls, terms: Sequence["Kept"]) -> "Kept":
        """Stack terms of one format, shape, axis and count along the rows."""
        first = terms[0]
        key = (first.format, first.axis, first.shape, first.count, first.parts)
        if any((t.format, t.axis, t.shape, t.count, t.parts) != key for t in terms):
            raise FormatError("only kept terms of one format, one shape and one count can be stacked.")
        by_columns = first.axis == "columns"
        shape, count = (first.shape[0] * len(terms), first.shape[1]), first.count * (1 if by_columns else len(terms))
        if not by_columns and not first.format.rows_apart:
            raise FormatError(f"kept rows in {first.format.name}, which ties rows together, cannot be stacked.")
        parts = first.parts * len(terms) if by_columns else 1
        tensors: dict[str, torch.Tensor] = {}
        if count:
            masks = [t.tensors["mask"] if by_columns else t.chosen() for t in terms]
            mask = torch.cat(masks) if by_columns else _pack(torch.cat(masks, 1))
            tensors = _tensors(mask, Packed.stack_rows([t.packed for t in terms]))
        return cls(first.format, first.axis, shape, count, tensors, parts)


def keep_columns(
    w: Float[torch.Tensor, "out in"], columns: Int[torch.Tensor, " count"], fmt: Format
) -> tuple[Kept, Float[torch.Tensor, "out in"]]:
    """Round some columns to a format; return them as a term, and a copy of the weight in which they are zero."""
    return _keep(w, "columns", columns, fmt)


def keep_rows(
    w: Float[torch.Tensor, "out in"], rows: Int[torch.Tensor, " count"], fmt: Format
) -> tuple[Kept, Float[torch.Tensor, "out in"]]:
    """Round some rows to a format; return them as a term, and a copy of the weight in which they are zero."""
    return _keep(w, "rows", rows, fmt)


def _keep(w: torch.Tensor, axis: Axis, indices: torch.Tensor, fmt: Format) -> tuple[Kept, torch.Tensor]:
    dim = 1 if axis == "columns" else 0
    n = w.shape[dim]
    if bool(((indices < 0) | (indices >= n)).any()):
        raise FormatError(f"some of the {axis} to keep are not among the {n} of the weight.")
    chosen = torch.zeros(n, dtype=torch.bool, device=w.device)
    chosen[indices.long()] = True
    rest = w.clone()
    rest.index_fill_(dim, chosen.nonzero()[:, 0], 0.0)
    if not indices.numel():
        return Kept(fmt, axis, (w.shape[0], w.shape[1]), 0, {}), rest
    taken = w.index_select(dim, chosen.nonzero()[:, 0])
    params = fmt.fit(taken)
    return Kept.place(Packed.pack(fmt, fmt.encode(taken, params), params), axis, chosen), rest


def _tensors(mask: torch.Tensor, packed: Packed) -> dict[str, torch.Tensor]:
    return {"mask": mask} | {f"kept.{name}": t for name, t in packed.tensors.items()}


def _pack(chosen: torch.Tensor) -> torch.Tensor:
    return dense.pack(chosen.to(torch.uint8), 1)


def _unpack(mask: torch.Tensor, count: int) -> torch.Tensor:
    return dense.unpack(mask, 1, count).bool()


def _packed_spec(fmt: Format, parts: int) -> dict[str, Any]:
    """Name the inner format, and its parts where it ties rows together."""
    return with_parts({"format": fmt.name}, 1 if fmt.rows_apart else parts)
