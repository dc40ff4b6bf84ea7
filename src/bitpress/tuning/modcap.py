"""ModCap: blocks are learned together where what they can hold differs most.

Source   Ma et al. 2023, "Solving Oscillation Problem in Post-Training Quantization Through a Theoretical Perspective", known here from its abstract and
         the public code (`MRECG.py`, whose configurations list the pairs): losses of blocks go up and down where neighbours differ in capacity, so
         those with the largest differences are learned together, by AdaRound.
Differs  the capacity of a block is the number of bits that are stored for its weights, the data-free one; the code has the choice made already. Blocks
         in a row that are joined make one window, of `window` blocks at most. Where all blocks hold the same nothing is joined: every block is
         learned by itself, as in `adaround`.
Update   join the `pairs` neighbours with the largest (capacity_i - capacity_i+1)^2 above 0
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bitpress.errors import UsageError
from bitpress.tuning.adaround import AdaRound
from bitpress.tuning.tuner import Span

__all__ = ["ModCap"]


@dataclass(frozen=True, kw_only=True)
class ModCap(AdaRound):
    span: Span = "windows"
    window: int = 3
    pairs: int = 4

    summary: ClassVar[str] = "roundings by soft bits, over blocks that differ in the bits they hold"
    paper: ClassVar[str] = "P157"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1:
            raise UsageError(f"pairs={self.pairs}: it is 1 or more.")
        if self.span != "windows" or self.overlap:
            raise UsageError("modcap chooses its windows by what blocks hold: span=windows, and overlap=0.")

    def joined(self, capacities: Sequence[float]) -> list[range]:
        differences = [(a - b) ** 2 for a, b in itertools.pairwise(capacities)]
        parts = [range(i, i + 1) for i in range(len(capacities))]
        for at in sorted(range(len(differences)), key=lambda i: (-differences[i], i))[: self.pairs]:
            k = next(k for k, part in enumerate(parts) if at in part)
            if differences[at] > 0 and len(parts[k]) + len(parts[k + 1]) <= self.window:
                parts[k : k + 2] = [range(parts[k].start, parts[k + 1].stop)]
        return parts
