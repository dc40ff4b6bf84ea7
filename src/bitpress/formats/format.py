"""A number format: a grid, the block that shares its parameters, and how those are stored.

Parameters are tensors `[block rows, block cols]`. `fit` returns them already rounded to what the file will hold, so that what
`encode` decides and what a reader decodes are the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.block import Block
from bitpress.formats.dense import row_bytes
from bitpress.formats.grid import Grid, Params, StoredParam

__all__ = ["SCALE_DTYPES", "Format"]

SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Weights that a clipping search works on at a time: half a megabyte.
SEARCHED_TOGETHER = 1 << 17

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    grid: Grid
    block: Block
    scale: str = "fp16"

    def __post_init__(self) -> None:
        if self.scale not in SCALE_DTYPES:
            raise FormatError(f"unknown scale type {self.scale!r}; scales are stored as {', '.join(SCALE_DTYPES)}.")

    @property
    def name(self) -> str:
        """The canonical name, `int4-g64-zero`; `parse_format(name)` gives the format back."""
        parts = [self.grid.name, self.block.name]
        parts += ["zero"] if any(p.name == "zero" for p in self.grid.params) else []
        parts += [self.scale] if self.scale != "fp16" else []
        return "-".join(parts)

    def block_grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many blocks a weight `[out, in]` has along each axis. Raises FormatError when they do not fit."""
        rows, cols = self.block.resolve(shape, self.grid.span)
        return shape[0] // rows, shape[1] // cols

    def expected(self, shape: tuple[int, int]) -> Expected:
        """Give dtype and shape of every tensor that a packed weight of this shape stores."""
        down, across = self.block_grid(shape)
        codes = row_bytes(shape[1] // self.grid.span, self.grid.code_bits)
        tensors: Expected = {"codes": (torch.uint8, (shape[0], codes))}
        for param in self.grid.params:
            if param.scope == "tensor":
                tensors[param.name] = (SCALE_DTYPES[self.scale], param.shape)
            elif param.kind == "scale":
                tensors[param.name] = (SCALE_DTYPES[self.scale], (down, across))
            else:
                tensors[param.name] = (torch.uint8, (down, row_bytes(across, param.bits)))
        return tensors

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a weight of this shape takes, parameters included."""
        return sum(dtype.itemsize * math.prod(dims) for dtype, dims in self.expected(shape).values())

    def fit(
        self,
        w: Float[torch.Tensor, "out in"],
        importance: Float[torch.Tensor, "*rows in"] | None = None,
        shrink: Sequence[float] = (1.0,),
    ) -> Params:
        """Choose parameters for every block.

        Every ratio in `shrink` is tried as a factor on the block's range, and the one with the smallest squared error
        (weighted by `importance`, per input or per weight) is kept: (1.0,) is plain min-max. Raises NumericsError when
        the weight is not finite or a scale does not fit the storage type.
        """
        if not bool(torch.isfinite(w).all()):
            raise NumericsError("the weight holds a NaN or an infinity; repair the checkpoint or skip the layer.")
        down, across = self.block_grid((w.shape[0], w.shape[1]))
        blocks = self._to_blocks(w.float())
        weights = None if importance is None else self._to_blocks(importance.float().expand(w.shape))
        # A few blocks at a time: the search reads them once for every ratio, and they should still be in the cache.
        shared = any(p.scope == "tensor" for p in self.grid.params)
        size = len(blocks) if shared else max(SEARCHED_TOGETHER // blocks.shape[1], 1)
        found = [
            self._search(part, None if weights is None else weights[a : a + len(part)], shrink)
            for a, part in zip(range(0, len(blocks), size), blocks.split(size), strict=True)
        ]
        return {
            p.name: torch.cat([f[p.name] for f in found]).reshape(down, across) if p.scope == "block" else found[0][p.name]
            for p in self.grid.params
        }

    def _search(self, blocks: Float[torch.Tensor, "blocks n"], weights: torch.Tensor | None, shrink: Sequence[float]) -> Params:
        best = self._rounded(self.grid.fit(blocks * shrink[0], weights))
        if len(shrink) > 1:
            best_error = self._error(blocks, weights, best)
            for ratio in shrink[1:]:
                trial = self._rounded(self.grid.fit(blocks * ratio, weights))
                error = self._error(blocks, weights, trial)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best = {p.name: self._choose(p, better, trial[p.name], best[p.name]) for p in self.grid.params}
        return best

    def encode(self, w: Float[torch.Tensor, "out in"], params: Params) -> Int[torch.Tensor, "out codes"]:
        """Give the nearest code of every weight under given parameters."""
        codes = self.grid.encode(self._to_blocks(w.float()), self._per_block(params))
        return self._from_blocks(codes, w.shape[0], self.grid.span)

    def decode(self, codes: Int[torch.Tensor, "out codes"], params: Params) -> Float[torch.Tensor, "out in"]:
        """Give the weights in float32: `(codes - zero) * scale` for integers."""
        values = self.grid.decode(self._to_blocks(codes, self.grid.span), self._per_block(params))
        return self._from_blocks(values, codes.shape[0])

    def columns(self, params: Params, shape: tuple[int, int], start: int) -> Params:
        """Give the parameters that hold at column `start`, one row each: `[out, 1]`, for loops over columns."""
        rows, cols = self.block.resolve(shape, self.grid.span)
        across = start // cols
        at_column = {}
        for p in self.grid.params:
            value = params[p.name]
            if p.scope == "block":
                value = value[:, across : across + 1]
                value = value if rows == 1 else value.repeat_interleave(rows, 0)
            at_column[p.name] = value
        return at_column

    def _rounded(self, params: Params) -> Params:
        dtype = SCALE_DTYPES[self.scale]
        rounded = {}
        for p in self.grid.params:
            value = params[p.name]
            if p.kind == "scale":
                value = value.to(dtype).float()
                if not bool(torch.isfinite(value).all()):
                    raise NumericsError(f"a scale is beyond the range of {self.scale}; store scales as fp32 or bf16.")
            rounded[p.name] = value
        return rounded

    def _error(self, blocks: torch.Tensor, weights: torch.Tensor | None, params: Params) -> torch.Tensor:
        difference = self.grid.decode(self.grid.encode(blocks, params), params).sub_(blocks).square_()
        return (difference if weights is None else difference.mul_(weights)).sum(-1, keepdim=True)

    @staticmethod
    def _choose(param: StoredParam, better: torch.Tensor, trial: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        return torch.where(better, trial, best) if param.scope == "block" else best

    def _per_block(self, params: Params) -> Params:
        return {p.name: params[p.name].reshape(-1, 1) if p.scope == "block" else params[p.name] for p in self.grid.params}

    def _extent(self, shape: tuple[int, int], unit: int) -> tuple[int, int]:
        rows, cols = self.block.resolve((shape[0], shape[1] * unit), self.grid.span)
        return rows, cols // unit

    def _to_blocks(self, values: torch.Tensor, unit: int = 1) -> torch.Tensor:
        """`[out, in / unit]` -> `[blocks, values of a block]`, blocks in row-major order; a code is `unit` weights."""
        rows, cols = self._extent((values.shape[0], values.shape[1]), unit)
        if rows == 1:
            return values.reshape(-1, cols)
        down, across = values.shape[0] // rows, values.shape[1] // cols
        return values.reshape(down, rows, across, cols).transpose(1, 2).reshape(-1, rows * cols)

    def _from_blocks(self, blocks: torch.Tensor, out_features: int, unit: int = 1) -> torch.Tensor:
        width = blocks.numel() // out_features
        rows, cols = self._extent((out_features, width), unit)
        if rows == 1:
            return blocks.reshape(out_features, width)
        down, across = out_features // rows, width // cols
        return blocks.reshape(down, across, rows, cols).transpose(1, 2).reshape(out_features, width)
