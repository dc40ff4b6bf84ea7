"""Spans of several blocks: which of them are learned together, which run behind them, and which are committed when that is done.

    windows of 3 with 1 overlapping, of 6 blocks        learned 0 1 2, committed 0 1;  learned 2 3 4, committed 2 3;  learned 4 5, both committed

A window begins with the hidden states behind the last committed block, and its blocks are compressed anew from there: so these states are
all that a stopped run needs to go on, and nothing that is committed changes later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bitpress.tuning.tuner import Tuning

__all__ = ["Window", "cut_windows"]


@dataclass(frozen=True)
class Window:
    """Blocks `first` to `first + learned - 1` are learned by the outputs of the last of them and of `ahead` blocks behind; the first `final` of
    them are committed then."""

    first: int
    learned: int
    ahead: int
    final: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.learned)

    @property
    def through(self) -> range:
        """The blocks that run: those that are learned and those ahead."""
        return range(self.first, self.first + self.learned + self.ahead)


def cut_windows(tuning: Tuning, blocks: int, capacities: Sequence[float]) -> list[Window]:
    """Return the windows of a model. `capacities` is the size of what each block can hold, for tunings that choose windows by it."""
    if (pairs := tuning.joined(capacities)) is not None:
        return [Window(part[0], len(part), min(tuning.ahead, blocks - part[-1] - 1), len(part)) for part in pairs]
    windows, at = list[Window](), 0
    while at < blocks:
        learned = min(tuning.window, blocks - at)
        last = at + learned == blocks
        final = learned if last else learned - tuning.overlap
        windows.append(Window(at, learned, min(tuning.ahead, blocks - at - learned), final))
        at += final
    return windows
