"""Fake quantization: encode and decode a tensor, with a gradient for training.

    forward     decode(encode(x)), exactly
    backward    the straight-through rule: 1 where x lies inside the range of its block's levels, 0 where it is clipped

The range reaches half a step beyond the outermost levels, where a value still rounds without clamping. A dynamic scale that clips
nothing therefore stays without clipping after its own rounding. A grid that codes several values together has no such range; its
gradient is 1 everywhere. Parameters get no gradient, unless `ranges` asks for that of fitted ones: a block's largest value sets its
scale, so rounding a block that is c times as large gives c times as much, and the derivative along the block is Q(x). What the
straight-through rule leaves of that, Q(x) - x inside the range, is the largest value's:

    dQ/d range = (Q - x inside) / range       range = max |x|; with a zero point or a minimum max x - min x, each end for its side
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

__all__ = ["clip_blocks", "fake_quantize", "inside_range"]

# Number of levels decoded at a time to find the ends of every block: 16 MB.
DECODED_TOGETHER = 1 << 22


def fake_quantize(
    x: Float[torch.Tensor, "*shape"], fmt: Format, params: Params | None = None, *, ranges: bool = False
) -> Float[torch.Tensor, "*shape"]:
    """Return x after encoding and decoding in `fmt`, in the type of x; with `ranges`, parameters fitted to x have a gradient too.

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
    if not x.requires_grad:
        return quantized
    inside = inside_range(flat, fmt, params).reshape(x.shape)
    if not ranges:
        result: torch.Tensor = _StraightThrough.apply(x, quantized, inside)
        return result
    ends = _ends(x.reshape(-1, x.shape[-1]).float(), fmt)
    result = _ThroughRanges.apply(x, ends, quantized, inside, fmt)
    return result


def _ends(x: Float[torch.Tensor, "rows cols"], fmt: Format) -> Float[torch.Tensor, "2 blocks"]:
    """Return the values that set the range of every block, the highest and the lowest; the lowest is 0 where the scale stands alone."""
    blocks = fmt.to_blocks(x)
    if not _has_two_ends(fmt):
        high = blocks.abs().amax(1)
        return torch.stack([high, torch.zeros_like(high)])
    return torch.stack([blocks.amax(1).clamp(min=0), blocks.amin(1).clamp(max=0)])


def clip_blocks(
    x: Float[torch.Tensor, "*shape"], fmt: Format, high: Float[torch.Tensor, "*blocks"], low: Float[torch.Tensor, "*blocks"]
) -> Float[torch.Tensor, "*shape"]:
    """Return x with every block of `fmt` between `high` times its largest and `low` times its smallest value, 0 among them.

    The factors are one for all blocks or one each. They, and the values that are the ends, have the gradient of what is clipped.
    """
    flat = x.reshape(-1, x.shape[-1])
    blocks = fmt.to_blocks(flat)
    ends = blocks.amax(1).clamp(min=0) * high, blocks.amin(1).clamp(max=0) * low
    kept = torch.maximum(torch.minimum(blocks, ends[0][:, None]), ends[1][:, None])
    return fmt.from_blocks(kept, flat.shape[0]).reshape(x.shape)


def _has_two_ends(fmt: Format) -> bool:
    return any(p.name in ("zero", "min") for p in fmt.grid.params)


class _ThroughRanges(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ends: torch.Tensor, quantized: torch.Tensor, inside: torch.Tensor, fmt: Format
    ) -> torch.Tensor:
        ctx.save_for_backward(x, ends, quantized, inside)
        ctx.fmt = fmt
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ends, quantized, inside = ctx.saved_tensors
        fmt: Format = ctx.fmt
        g, flat, q, within = (t.reshape(-1, x.shape[-1]) for t in (gradients[0].float(), x.float(), quantized.float(), inside))
        extent = ends[0] - ends[1]
        extent = torch.where(extent == 0, 1.0, extent)
        two = _has_two_ends(fmt)
        rest = torch.where(within, q - flat, 0.0 if two else q)
        moved = fmt.to_blocks(g * rest).sum(1) / extent
        high, low = moved, -moved if two else torch.zeros_like(moved)
        if two:  # a clipped value is the end itself
            clipped = torch.where(within, 0.0, g)
            high = high + fmt.to_blocks(torch.where(flat > q, clipped, 0.0)).sum(1)
            low = low + fmt.to_blocks(torch.where(flat < q, clipped, 0.0)).sum(1)
        return torch.where(inside, gradients[0], 0.0), torch.stack([high, low]), None, None, None


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
