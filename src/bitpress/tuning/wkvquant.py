"""WKVQuant's cross-block regularisation: the ends of a block's ranges by its own output and those of the blocks behind it.

Source   Yue et al. 2024, "WKVQuant: Quantizing Weight and Key/Value Cache for Large Language Models Gains More", known here from its abstract and
         summaries of it: parameters are learned by the mean absolute error of what the following blocks make of a block's output, five of them.
Differs  learned clipping is what is learned, where the paper has its own smoothing beside it; the outputs are those of the block and of the blocks
         behind it, each relative to the mean size of its target. Its two-dimensional rounding of the cache belongs to the cache.
Update   loss = mean over k of |blocks_k(y) - blocks_k(y*)| / |blocks_k(y*)|,  k = 0 to `ahead`, the blocks behind as they are in the original
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.tuning.learned_clipping import LearnedClipping
from bitpress.tuning.tuner import LossName, Span

__all__ = ["WKVQuant"]


@dataclass(frozen=True, kw_only=True)
class WKVQuant(LearnedClipping):
    span: Span = "windows"
    ahead: int = 5
    loss: LossName = "mae"

    summary: ClassVar[str] = "ends of ranges by the outputs of a block and of the blocks behind it"
    paper: ClassVar[str] = "P164"
