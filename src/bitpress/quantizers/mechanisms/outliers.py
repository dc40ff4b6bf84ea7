"""Outliers: weights that are kept apart, and what the blocks that they were in are fitted to then."""

import torch
from jaxtyping import Bool, Float

from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.formats.terms.sparse import sparse

__all__ = ["in_blocks", "with_outliers", "without"]


def without(w: Float[torch.Tensor, "out in"], mask: Bool[torch.Tensor, "out in"], fmt: Format) -> torch.Tensor:
    """Put the mean of a block's other weights in place of those where `mask` holds; 0 where there are no others."""
    tiles, others = in_blocks(w, fmt), in_blocks((~mask).float(), fmt)
    mean = (tiles * others).sum((1, 3), keepdim=True) / others.sum((1, 3), keepdim=True).clamp(min=1)
    return torch.where(mask, mean.expand(tiles.shape).reshape(w.shape), w)


def in_blocks(w: Float[torch.Tensor, "out in"], fmt: Format) -> Float[torch.Tensor, "down rows across cols"]:
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    return w.reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols)


def with_outliers(
    w: Float[torch.Tensor, "out in"], outliers: Bool[torch.Tensor, "out in"], fmt: Format, params: Params
) -> CompressedWeight:
    """Round, and keep beside the codes what those of outliers lack."""
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    if not outliers.any():
        return CompressedWeight((packed,))
    return CompressedWeight((packed, sparse(w - packed.dequantize(), outliers)))
