"""QLLM's channel reassembly: split channels of outliers into several of a like size, and merge as many like channels, so that none are added.

Source   Liu et al. 2023, "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models" (P130): its abstract, its public code as
         an index has it (`assembly/ca_module.py`: `bipartite_soft_matching_x_w`, `assembly`), and a summary of its distance of channels.
Differs  Approximate: merging changes the function before any rounding. The distance is the paper's as that summary has it, in closed form, where
         the code adds up distances first. Every weight has a map of its own, where siblings share one there. `steps` limits of size in equal
         ratios are tried, by the error of the weight's own output with inputs rounded to integers of `bits` (a scale for every token) and the
         weight as it is; no reassembly is tried too. The tuning of low-rank weights is left out. `disassemble` splits without merging.
Needs    sample [tokens, in] float32.      Cost  O(in^2 (tokens + out)) time, 8 bytes a channel; runs online.
Update   f = max(1, ceil(max |x| / limit)) by channel; even channels go to the nearest odd one, the sum of f - 1 of least distance first;
         D(i, j) = |x_i - x_j|^2 |w_i - w_j|^2 / 4
Fails    CalibrationError when no token reached the weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import CalibrationError, UsageError
from bitpress.formats import Format, parse_format
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.transforms.basis import Maps
from bitpress.transforms.disassemble import limits_of
from bitpress.transforms.sites import Sites
from bitpress.transforms.transform import InputStats

__all__ = ["Reassemble", "reassembled"]


@dataclass(frozen=True)
class Reassemble:
    """`share` of the channels at most are merged; `bits` of the integers that limits are compared by."""

    share: float = 0.1
    steps: int = 20
    bits: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"sample"})
    sites: ClassVar[Sites] = {"layer input": frozenset({"online"})}
    summary: ClassVar[str] = (
        "split channels of outliers and merge as many like ones; approximate, as merging changes the function"
    )
    paper: ClassVar[str] = "P130"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise UsageError(f"share={self.share}: it is above 0 and at most 0.5.")
        if self.steps < 1:
            raise UsageError(f"steps={self.steps}: at least 1 limit must be tried.")
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits}: it is from 2 to 8.")

    def plan(self, w: Float[torch.Tensor, "out in"], stats: InputStats | None, fmt: Format) -> Maps:
        x = None if stats is None else stats.sample
        if x is None or len(x) == 0:
            raise CalibrationError("reassemble: no calibration statistics reached this weight; sample is needed.")
        x, w, rounding = x.float(), w.float(), parse_format(f"int{self.bits}-row-fp32")
        wanted = x @ w.T

        def error_of(change: Reassembly | None) -> float:
            u, columns = (x, w) if change is None else (change.apply(x), change.dual().apply(w))
            return float((fake_quantize(u, rounding) @ columns.T - wanted).double().square().sum())

        distance = _distances(x, w)
        best, least = None, error_of(None)
        for limit in limits_of(x.abs().amax(0), int(self.share * x.shape[1]), self.steps):
            change = reassembled(x.abs().amax(0), distance, limit)
            if change is not None and (error := error_of(change)) < least:
                best, least = change, error
        return best and Reassembly(best.into.int().cpu(), best.copied.int().cpu()), None


def _distances(x: Float[torch.Tensor, "tokens in"], w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "even odd"]:
    """Return what merging an even channel with an odd one changes of all outputs, squared."""
    by_input, by_column = (torch.cdist(t.T[::2].contiguous(), t.T[1::2].contiguous()) for t in (x, w))
    return (by_input * by_column / 2).square()


def reassembled(
    sizes: Float[torch.Tensor, " in"], distance: Float[torch.Tensor, "even odd"], limit: float
) -> Reassembly | None:
    """Return the map under a limit of channels' sizes; None where nothing is beyond it, or too few channels are left to merge."""
    parts = (sizes / limit).ceil().clamp(min=1).long()
    split, wanted = parts > 1, int((parts - 1).sum())
    left = distance.masked_fill(split[::2, None] | split[None, 1::2], torch.inf)
    nearest, at = left.min(1)
    if not 0 < wanted <= int(nearest.isfinite().sum()):
        return None
    merged = nearest.argsort(stable=True)[:wanted]
    into = torch.arange(len(sizes), device=sizes.device)
    copied = into.clone()
    into[2 * merged] = 2 * at[merged] + 1
    copied[2 * merged] = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), parts - 1)
    return Reassembly(into, copied)
