"""Packed: one term of codes, with the parameters that give them meaning. Data only.

A weight may be several weights stacked along the rows (experts) that share nothing: `parts` of equal height. If the format ties rows
together, each part has its own parameters, one part's tensors after the other's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats.format import Expected, Format
from bitpress.formats.grids.grid import Params
from bitpress.formats.layouts import dense as dense
from bitpress.formats.scale_store import shared_name
from bitpress.formats.table import stored_format
from bitpress.formats.terms.specs import check_rows, read_parts, with_parts

__all__ = ["Packed"]


@dataclass(frozen=True)
class Packed:
    format: Format
    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]
    parts: int = 1

    kind: ClassVar[str] = "packed"

    @classmethod
    def pack(cls, fmt: Format, codes: Int[torch.Tensor, "out codes"], params: Params) -> "Packed":
        """Pack codes and parameters from `fmt.fit`."""
        shape = (codes.shape[0] * fmt.rows_per_code, codes.shape[1] * fmt.grid.span)
        down, _ = fmt.block_grid(shape)
        stored = {"codes": fmt.codes_layout.pack(codes, fmt.grid.code_bits)}
        for p in fmt.grid.params:
            if p.kind == "code":
                stored[p.name] = dense.pack(params[p.name].to(torch.uint8), p.bits)
            elif p.kind == "value":
                stored[p.name] = params[p.name].to(p.value_type).contiguous()
            else:
                outer = {part: params[shared_name(p.name, part)] for part in fmt.store.expected(1, 1) if part}
                for part, t in fmt.store.pack(params[p.name].reshape(down, -1), outer).items():
                    stored[shared_name(p.name, part)] = t
        return cls(fmt, shape, stored)

    def unpack(self) -> tuple[Int[torch.Tensor, "out codes"], Params]:
        """Return the codes, and the parameters `[block rows, block cols, *shape]` in float32. Only for a weight of one part."""
        return self.unpack_codes(), self.unpack_params()

    def unpack_codes(self) -> Int[torch.Tensor, "out codes"]:
        grid = self.format.grid
        return self.format.codes_layout.unpack(self.tensors["codes"], grid.code_bits, self.shape[1] // grid.span)

    def unpack_params(self) -> Params:
        fmt = self.format
        assert self.parts == 1, "parameters belong to one part"
        down, across = fmt.block_grid(self.shape)
        params: dict[str, torch.Tensor] = {}
        for p in fmt.grid.params:
            if p.kind == "code":
                params[p.name] = dense.unpack(self.tensors[p.name], p.bits, across).float()
            elif p.kind == "value":
                params[p.name] = self.tensors[p.name].float()
            else:
                count = across
                for size in p.shape:
                    count *= size
                stored = {part: self.tensors[shared_name(p.name, part)] for part in fmt.store.expected(1, 1)}
                params[p.name] = fmt.store.unpack(stored, count).reshape(down, across, *p.shape)
        return params

    def unpack_shared(self) -> Params:
        """Return the values that scales share, by their stored names, in the shapes in which `Format.stored` takes them."""
        fmt, found = self.format, dict[str, torch.Tensor]()
        _, across = fmt.block_grid(self.shape)
        for p in fmt.grid.params:
            if p.kind == "scale":
                stored = {part: self.tensors[shared_name(p.name, part)] for part in fmt.store.expected(1, 1)}
                outer = fmt.store.stored_outer(stored, across * math.prod(p.shape))
                found |= {shared_name(p.name, part): t for part, t in outer.items()}
        return found

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32."""
        if self.parts > 1:
            return torch.cat([part.dequantize() for part in self._apart()])
        return self.format.decode(*self.unpack())

    def spec(self) -> dict[str, Any]:
        return with_parts({"format": self.format.name}, self.parts)

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor that this specification implies."""
        if not {"format"} <= set(spec) <= {"format", "parts"} or not isinstance(spec["format"], str):
            raise FormatError(f"a packed term needs the name of its format and its parts, got {sorted(spec)}.")
        parts = read_parts(spec, shape[0])
        one = stored_format(spec["format"]).expected((shape[0] // parts, shape[1]))
        return {name: (dtype, (dims[0] * parts, *dims[1:])) for name, (dtype, dims) in one.items()}

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "Packed":
        return cls(stored_format(spec["format"]), shape, tensors, read_parts(spec, shape[0]))

    def check(self) -> None:
        """Raise FormatError if a stored parameter is not finite, or a code or a byte is invalid."""
        for part in self._apart():
            for name, value in part.unpack_params().items():
                if not bool(torch.isfinite(value).all()):
                    raise FormatError(f"{name} holds a NaN or an infinity.")
        grid = self.format.grid
        if grid.num_codes < 1 << grid.code_bits:
            grid.check(self.unpack_codes())

    def row_slice(self, start: int, stop: int) -> "Packed":
        """Return rows `start` to `stop` as a separate term, sharing memory; both must be at the edges of blocks and parts."""
        check_rows(self.shape[0], start, stop)
        height = self.shape[0] // self.parts
        if self.format.rows_apart:
            rows, _ = self.format.block.resolve((stop - start, self.shape[1]), self.format.grid.span)
            parts = 1
        else:
            rows, parts = height, (stop - start) // height
        if start % rows or stop % rows:
            raise FormatError(f"rows {start} to {stop} begin or end inside a block of {rows} rows.")
        whole = self.shape[0]
        sliced = {name: t[t.shape[0] * start // whole : t.shape[0] * stop // whole] for name, t in self.tensors.items()}
        return Packed(self.format, (stop - start, self.shape[1]), sliced, parts)

    def rows(self, index: Int[torch.Tensor, " count"]) -> Float[torch.Tensor, "count in"]:
        """Return some rows in float32, in any order; only the blocks that hold them are decoded, where rows share nothing."""
        if not self.format.rows_apart:
            return self.dequantize()[index]
        height, _ = self.format.block.resolve(self.shape, self.format.grid.span)
        bands, at = torch.unique(index // height, return_inverse=True)
        down = self.shape[0] // height
        cut = {name: t.unflatten(0, (down, -1))[bands].flatten(0, 1) for name, t in self.tensors.items()}
        some = Packed(self.format, (len(bands) * height, self.shape[1]), cut).dequantize()
        return some[at * height + index % height]

    @classmethod
    def stack_rows(cls, terms: Sequence["Packed"]) -> "Packed":
        """Stack terms of one format and shape along the rows."""
        first = terms[0]
        if any(t.format != first.format or t.shape != first.shape for t in terms):
            raise FormatError("only terms of one format and one shape can be stacked.")
        joined = {name: torch.cat([t.tensors[name] for t in terms]) for name in first.tensors}
        parts = 1 if first.format.rows_apart else sum(t.parts for t in terms)
        return cls(first.format, (sum(t.shape[0] for t in terms), first.shape[1]), joined, parts)

    def _apart(self) -> list["Packed"]:
        height = self.shape[0] // self.parts
        return [self] if self.parts == 1 else [self.row_slice(a, a + height) for a in range(0, self.shape[0], height)]
