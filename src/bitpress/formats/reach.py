"""Whether a format can store the size of a weight: scales too small for the store become zero, or far too large.

    wanted   the scale of a block: its largest weight times the grid's scale for a block whose largest weight is 1
    kept     that scale, rounded by the store
    lost     a row with more than 1/16 of its energy in blocks whose kept scale is off by more than the store's coarseness

A grid without scales stores its levels as float16; an eighth of a block's largest weight is tested instead. Rows smaller than 2^-40
of the largest one (channels that decayed in training) are rounding errors of their matrix and are left out.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float

from bitpress.errors import NumericsError
from bitpress.formats.format import Format
from bitpress.formats.scales import SCALES

__all__ = ["changed_rows", "lost_rows", "widened"]

# The smallest levels that matter, relative to the largest weight.
LEVEL = 1 / 8
# Share of the energy of a row.
SHARE = 1 / 16
# Share of the energy of the largest row: 2^-40 of its length.
SMALLEST = 2.0**-80


def lost_rows(w: Float[torch.Tensor, "out in"], fmt: Format) -> Bool[torch.Tensor, " out"]:
    """Return a mask of the rows of a finite weight that lose their size in this format."""
    rows, _ = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    largest = w.abs().max()
    none = torch.zeros(w.shape[0], dtype=torch.bool, device=w.device)
    if not float(largest):
        return none
    # Relative to the largest weight: squares of the smallest and the largest float32 values are out of the range of float32.
    blocks = fmt.to_blocks(w.float() / largest)
    grid = fmt.block_grid((w.shape[0], w.shape[1]))
    size, energy = blocks.abs().amax(-1).view(grid), blocks.square().sum(-1).view(grid)
    scales = [p.name for p in fmt.grid.params if p.kind == "scale"]
    store, unit = SCALES["fp16"], LEVEL
    if scales:
        block = blocks[size.argmax()][None]
        store, unit = fmt.store, max(float(fmt.grid.fit(block)[name].max()) for name in scales)
    wanted = size * unit * largest
    try:
        kept = store.round(wanted, store.outer(wanted))
    except NumericsError:  # beyond the range; only the sizes of the rows tell which
        return ~none
    off = (kept - wanted).abs() > store.coarseness * wanted
    whole = energy.sum(1)
    lost = (torch.where(off, energy, 0.0).sum(1) > SHARE * whole) & (whole > SMALLEST * whole.max())
    return lost.repeat_interleave(rows)


def changed_rows(
    w: Float[torch.Tensor, "out in"], w_hat: Float[torch.Tensor, "out in"], fmt: Format
) -> Bool[torch.Tensor, " out"]:
    """Return a mask of the rows of a compressed weight whose size is off by a factor of 4, which no choice of codes explains.

    Rows of one block are judged together: a small row beside a large one may change its size inside the block.
    """
    rows, _ = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    largest = torch.maximum(w.abs().max(), w_hat.abs().max())
    if not float(largest):
        return torch.zeros(w.shape[0], dtype=torch.bool, device=w.device)
    before, after = ((m / largest).square().sum(1).view(-1, rows).sum(1) for m in (w.float(), w_hat))
    changed = ((after < before / 16) | (after > before * 16)) & (before > SMALLEST * before.max())
    return changed.repeat_interleave(rows)


def widened(fmt: Format) -> Format | None:
    """Return the format with scales in float32, the store of the widest range; None if it has no scales or already stores float32."""
    has_scales = any(p.kind == "scale" for p in fmt.grid.params)
    return replace(fmt, scale="fp32") if has_scales and fmt.scale != "fp32" else None
