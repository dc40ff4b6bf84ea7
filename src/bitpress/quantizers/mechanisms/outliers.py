"""Outliers: weights that are stored apart, and the values to which their blocks are then fitted."""

import torch
from jaxtyping import Bool, Float

from bitpress.formats import CompressedWeight, Format, Packed, Params
from bitpress.formats.terms.sparse import sparse

__all__ = ["in_blocks", "with_outliers", "without"]


def without(w: Float[torch.Tensor, "out in"], mask: Bool[torch.Tensor, "out in"], fmt: Format) -> torch.Tensor:
    """Replace the weights under `mask` by the mean of the other weights of their block, or by 0 if there are none."""
    tiles, others = in_blocks(w, fmt), in_blocks((~mask).float(), fmt)
    mean = (tiles * others).sum((1, 3), keepdim=True) / others.sum((1, 3), keepdim=True).clamp(min=1)
    return torch.where(mask, mean.expand(tiles.shape).reshape(w.shape), w)


def in_blocks(w: Float[torch.Tensor, "out in"], fmt: Format) -> Float[torch.Tensor, "down rows across cols"]:
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    return w.reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols)


def with_outliers(
    w: Float[torch.Tensor, "out in"], outliers: Bool[torch.Tensor, "out in"], fmt: Format, params: Params
) -> CompressedWeight:
    """Round, and store the remainder of the outliers beside the codes."""
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    if not outliers.any():
        return CompressedWeight((packed,))
    return CompressedWeight((packed, sparse(w - packed.dequantize(), outliers)))
