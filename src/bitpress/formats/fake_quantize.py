"""Fake quantization: encode and decode a tensor, with a gradient for training.

    forward     decode(encode(x)), exactly
    backward    the straight-through rule: 1 where x lies inside the range of its block's levels, 0 where it is clipped

The range reaches half a step beyond the outermost levels, where a value still rounds without clamping. A dynamic scale that clips
nothing therefore stays without clipping after its own rounding. A grid that codes several values together has no such range; its
gradient is 1 everywhere. Parameters get no gradient.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError, NumericsError
from bitpress.formats.format import Format
from bitpress.formats.grids.grid import EvenlySpaced, Grid, Params, Streamed
from bitpress.formats.grids.levels import Levels
from bitpress.formats.layouts.dense import code_dtype

__all__ = ["fake_quantize", "inside_range"]

# Number of levels decoded at a time to find the ends of every block: 16 MB.
DECODED_TOGETHER = 1 << 22


def fake_quantize(x: Float[torch.Tensor, "*shape"], fmt: Format, params: Params | None = None) -> Float[torch.Tensor, "*shape"]:
    """Return x after encoding and decoding in `fmt`, in the type of x.

    All dimensions but the last are rows: tokens or output channels. Without `params`, parameters are fitted to x: one scale per token
    for `row`, one per group for `gN`. `params` must come from `fmt.fit` for the same number of rows; a `tensor` block serves any number.
    Raises NumericsError if x is not finite, FormatError if the block does not fit.
    """
    if x.ndim == 0:
        raise FormatError("a tensor without dimensions has no columns to quantize; add a dimension.")
    if x.numel() == 0:
        return x.clone()
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    if params is None:
        params = fmt.fit(flat)
    elif not bool(torch.isfinite(flat).all()):
        raise NumericsError("the tensor holds a NaN or an infinity.")
    quantized = fmt.decode(fmt.encode(flat, params), params).to(x.dtype).reshape(x.shape)
    inside = inside_range(flat, fmt, params).reshape(x.shape) if x.requires_grad else None
    result: torch.Tensor = _StraightThrough.apply(x, quantized, inside)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantized: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
        ctx.inside = inside
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.where(ctx.inside, gradients[0], 0.0), None, None


def inside_range(x: Float[torch.Tensor, "rows cols"], fmt: Format, params: Params) -> Bool[torch.Tensor, "rows cols"]:
    """Return which values round without clamping; all of them for grids whose levels have no order."""
    grid: Any = fmt.grid  # the protocol does not say so, but grids are frozen, and a key
    codes = _outer_codes(grid)
    if codes is None:
        return torch.ones_like(x, dtype=torch.bool)
    shape = (x.shape[0], x.shape[1])
    rows, cols = fmt.block.resolve(shape, fmt.grid.span)
    down, across = shape[0] // rows, shape[1] // cols
    by_block = fmt.per_block(params)
    size = max(DECODED_TOGETHER // codes.numel(), 1)
    ends = []
    for start in range(0, down * across, size):
        piece = slice(start, min(start + size, down * across))
        here = {p.name: by_block[p.name][piece] if p.scope == "block" else by_block[p.name] for p in fmt.grid.params}
        every = codes.to(x.device).expand(piece.stop - piece.start, -1).contiguous()
        levels = fmt.grid.decode(every, here).sort(-1).values
        low, high = levels[:, 0], levels[:, -1]
        ends.append(torch.stack([low - (levels[:, 1] - low) / 2, high + (high - levels[:, -2]) / 2]))
    by_place = torch.cat(ends, dim=1).reshape(2, down, 1, across, 1)
    blocks = x.reshape(down, rows, across, cols)
    return ((blocks >= by_place[0]) & (blocks <= by_place[1])).reshape(x.shape)


@cache
def _outer_codes(grid: Grid) -> Int[torch.Tensor, " codes"] | None:
    """Return codes that include the two lowest and the two highest levels of any block; None if levels have no order."""
    if grid.span > 1 or isinstance(grid, Streamed):
        return None
    if isinstance(grid, EvenlySpaced):
        chosen = sorted({0, min(1, grid.top), max(grid.top - 1, 0), grid.top})
    elif isinstance(grid, Levels):
        # Two zeros are one level: keep the first.
        by_level = {level: code for code, level in reversed(list(enumerate(grid.levels))) if level == level}
        ordered = sorted(by_level)
        chosen = sorted({by_level[level] for level in (*ordered[:2], *ordered[-2:])})
    else:
        chosen = [code for code in range(1 << grid.code_bits) if grid.num_codes == 1 << grid.code_bits or _stands(grid, code)]
    return torch.tensor(chosen).to(code_dtype(grid.code_bits))


def _stands(grid: Grid, code: int) -> bool:
    try:
        grid.check(torch.tensor([code]).to(code_dtype(grid.code_bits)))
    except FormatError:
        return False
    return True
