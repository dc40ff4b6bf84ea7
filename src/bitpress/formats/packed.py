"""Packed: one term of a compressed weight, codes in the dense layout with their parameters. Data only.

codes   uint8 [out, row bytes]                 the dense layout of `dense.py`
scale   fp16 | bf16 | fp32 [block rows, block cols]
zero    uint8 [block rows, row bytes]          codes of the grid's width, dense; only where the format has a zero point
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8

from bitpress.errors import FormatError
from bitpress.formats import dense
from bitpress.formats.format import SCALE_DTYPES, Expected, Format
from bitpress.formats.grid import Params
from bitpress.formats.table import parse_format

__all__ = ["Packed"]


@dataclass(frozen=True)
class Packed:
    format: Format
    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]

    kind: ClassVar[str] = "packed"

    @classmethod
    def pack(cls, fmt: Format, codes: UInt8[torch.Tensor, "out codes"], params: Params) -> "Packed":
        """Pack codes and the parameters that `fmt.fit` gave."""
        stored = {"codes": dense.pack(codes, fmt.grid.code_bits)}
        for p in fmt.grid.params:
            if p.kind == "scale":
                stored[p.name] = params[p.name].to(SCALE_DTYPES[fmt.scale]).contiguous()
            else:
                stored[p.name] = dense.pack(params[p.name].to(torch.uint8), p.bits)
        return cls(fmt, (codes.shape[0], codes.shape[1] * fmt.grid.span), stored)

    def unpack(self) -> tuple[UInt8[torch.Tensor, "out codes"], Params]:
        """Give the codes, and the parameters `[block rows, block cols]` in float32."""
        fmt = self.format
        _, across = fmt.block_grid(self.shape)
        codes = dense.unpack(self.tensors["codes"], fmt.grid.code_bits, self.shape[1] // fmt.grid.span)
        params: dict[str, torch.Tensor] = {}
        for p in fmt.grid.params:
            if p.kind == "scale":
                params[p.name] = self.tensors[p.name].float()
            else:
                params[p.name] = dense.unpack(self.tensors[p.name], p.bits, across).float()
        return codes, params

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Give the weights in float32."""
        codes, params = self.unpack()
        return self.format.decode(codes, params)

    def spec(self) -> dict[str, Any]:
        return {"format": self.format.name}

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Give dtype and shape of every tensor that this specification implies."""
        if set(spec) != {"format"} or not isinstance(spec["format"], str):
            raise FormatError(f"a packed term is specified by its format's name alone, not by {sorted(spec)}.")
        return parse_format(spec["format"]).expected(shape)

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> "Packed":
        return cls(parse_format(spec["format"]), shape, tensors)

    def check(self) -> None:
        """Raise FormatError when a stored parameter is not finite."""
        for p in self.format.grid.params:
            if p.kind == "scale" and not bool(torch.isfinite(self.tensors[p.name]).all()):
                raise FormatError(f"{p.name} holds a NaN or an infinity.")

    def row_slice(self, start: int, stop: int) -> "Packed":
        """Give rows `start` to `stop` as a term of their own, sharing memory; both must lie between blocks."""
        rows, _ = self.format.block.resolve((stop - start, self.shape[1]), self.format.grid.span)
        if start % rows:
            raise FormatError(f"row {start} is inside a block of {rows} rows.")
        per_block = {p.name for p in self.format.grid.params if p.scope == "block"}
        sliced = {
            name: t[start // rows : stop // rows] if name in per_block else t[start:stop] if name == "codes" else t
            for name, t in self.tensors.items()
        }
        return Packed(self.format, (stop - start, self.shape[1]), sliced)

    @classmethod
    def stack_rows(cls, terms: Sequence["Packed"]) -> "Packed":
        """Put terms of one format and width below each other. Blocks may not run over all rows."""
        fmt = terms[0].format
        if fmt.block.rows == "all" or any(p.scope == "tensor" for p in fmt.grid.params):
            raise FormatError(f"{fmt.name}: weights that share parameters over all rows cannot be stacked; use row or gN.")
        joined = {name: torch.cat([t.tensors[name] for t in terms]) for name in terms[0].tensors}
        return cls(fmt, (sum(t.shape[0] for t in terms), terms[0].shape[1]), joined)
