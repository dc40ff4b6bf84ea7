"""AWQ's rounding: clip every block of weights if that reduces the error of its partial output, then round to nearest.

Source   Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"; the clipping search
         as in the authors' public code (`auto_clip.py`). The paper's scaling is the transform `awq-scale`, done before.
Differs  the squared error of a block's partial output is exact through its diagonal block of the gram, not from 512 sampled
         tokens; blocks of any shape; query and key weights are clipped too; `steps` limits from 1 to `smallest`, both included.
Needs    gram [in, in] float32.     Cost  O(steps * out * in * block columns) time, O(out * in) memory.
Update   limit = argmin over ratios of  sum over the block's rows  d gram[g, g] d',
         d = Q(w; fitted to clamp(w, ratio * max |w|)) - w
Fails    CalibrationError when no token reached the layer. Ratio 1 is tried first, so the error is never worse than without clipping.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.formats import CompressedWeight, Format, Packed, Params, Streamed
from bitpress.quantizers.quantizer import Outcome, Quantizer
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["AWQ"]


@dataclass(frozen=True)
class AWQ(Quantizer):
    steps: int = 10
    smallest: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ("awq-scale",)
    summary: ClassVar[str] = "activation-aware scaling, then clipping by output error and rounding to nearest"
    paper: ClassVar[str] = "P207"
    bits: ClassVar[tuple[float, float]] = (3, 4)

    def __post_init__(self) -> None:
        shrink_ratios("mse", self.steps, self.smallest)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        gram = (stats or Stats(0)).need_gram("awq")
        w = w.float()
        tiles = diagonal_tiles(gram, fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)[1])
        limit = block_limits(w, fmt)
        first = best = fmt.fit(w)
        error = partial_errors(w, best, fmt, tiles)
        whole = float(error.sum())
        clipped = torch.zeros_like(error, dtype=torch.bool)
        for ratio in shrink_ratios("mse", self.steps, self.smallest)[1:]:
            # Parameters of the whole weight (a codebook) stay as first fitted, so that blocks can choose independently.
            trial = fmt.fit(w.clamp(-limit * ratio, limit * ratio), shared=best)
            trial_error = partial_errors(w, trial, fmt, tiles)
            better = trial_error < error
            error = torch.where(better, trial_error, error)
            clipped |= better
            best = fmt.choose(better, trial, best)
        if isinstance(fmt.grid, Streamed) and float(partial_errors(w, best, fmt, tiles).sum()) > whole:
            # A path runs through all blocks below each other: what is better for each of them may be worse together.
            best, clipped = first, torch.zeros_like(clipped)
        weight = CompressedWeight((Packed.pack(fmt, fmt.encode(w, best), best),))
        return Outcome(weight, figures={"clipped": float(clipped.float().mean())})


def block_limits(w: Float[torch.Tensor, "out in"], fmt: Format) -> Float[torch.Tensor, "out in"]:
    """Return the largest magnitude of the block of every weight."""
    rows, cols = fmt.block.resolve((w.shape[0], w.shape[1]), fmt.grid.span)
    down, across = w.shape[0] // rows, w.shape[1] // cols
    largest = w.abs().reshape(down, rows, across, cols).amax((1, 3), keepdim=True)
    return largest.expand(down, rows, across, cols).reshape(w.shape)


def diagonal_tiles(gram: Float[torch.Tensor, "in in"], cols: int) -> Float[torch.Tensor, "across cols cols"]:
    """Return the square tiles of `cols` channels along the gram's diagonal."""
    across = gram.shape[0] // cols
    return gram.reshape(across, cols, across, cols).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def partial_errors(
    w: Float[torch.Tensor, "out in"], params: Params, fmt: Format, tiles: Float[torch.Tensor, "across cols cols"]
) -> Float[torch.Tensor, "down across"]:
    """Return the squared error of every block's partial output under `params`."""
    across, cols = tiles.shape[0], tiles.shape[1]
    difference = fmt.decode(fmt.encode(w, params), params).sub_(w)
    parts = difference.reshape(w.shape[0], across, cols).transpose(0, 1)  # [across, out, cols]
    by_row = torch.bmm(parts, tiles).mul_(parts).sum(-1).T  # [out, across]
    down, _ = fmt.block_grid((w.shape[0], w.shape[1]))
    return by_row.reshape(down, -1, across).sum(1)
