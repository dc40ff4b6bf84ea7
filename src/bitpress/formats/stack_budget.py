"""The number of blocks of every stacked weight to load, so that a model fits a budget of bytes.

The first terms of a weight of several terms (`formats.bit_stack`) are the same weight in fewer bytes. All blocks of a model beyond the
first of every weight have one order, and a budget loads the longest prefix that fits: a larger budget only adds blocks.

Source   Wang et al. 2024, "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
         and its public code: every weight keeps its first block, the others are sorted by their benefit.
Differs  blocks are sorted by their benefit per byte, at any level; the paper adds the second block of all weights before the third of
         any. The caller measures the benefit of a block; the paper takes the perplexity with one more block.
Cost     O(blocks * log(blocks)).
"""

import math
from collections.abc import Mapping, Sequence

from bitpress.errors import MemoryLimitError, UsageError

__all__ = ["choose_blocks", "sort_blocks"]

Errors = Mapping[str, Sequence[float]]
Bytes = Mapping[str, Sequence[int]]


def choose_blocks(errors: Errors, nbytes: Bytes, budget: int) -> dict[str, int]:
    """Return the number of blocks of every weight to load, at least one, so that together they take at most `budget` bytes.

    errors[name][k] is the error of the model while this weight has k + 1 blocks, nbytes[name][k] the size of its block k. Raises
    MemoryLimitError if the first blocks alone are too large, and UsageError if the figures do not match.
    """
    order = sort_blocks(errors, nbytes)
    counts = dict.fromkeys(errors, 1)
    left = budget - sum(sizes[0] for sizes in nbytes.values())
    if left < 0:
        raise MemoryLimitError(f"{budget:,} bytes are too few: the first blocks of all weights take {budget - left:,}.")
    for name in order:
        left -= nbytes[name][counts[name]]
        if left < 0:
            break
        counts[name] += 1
    return counts


def sort_blocks(errors: Errors, nbytes: Bytes) -> list[str]:
    """Return the names of the weights in the order in which they get one more block: the most error removed per byte first.

    Blocks after which the error only grows are left out. A block of little benefit is placed with a later block of its weight of
    large benefit, which cannot be loaded without it.
    """
    steps: list[tuple[float, int, str, int]] = []
    for place, (name, losses) in enumerate(errors.items()):
        sizes = nbytes.get(name, ())
        if not losses or len(losses) != len(sizes) or min(sizes) < 1 or not all(map(math.isfinite, losses)):
            raise UsageError(
                f"{name}: {len(losses)} errors and {len(sizes)} sizes; every block needs a finite error and a size."
            )
        steps += [(-gain, place, name, count) for gain, count in _slopes(losses, sizes) if gain > 0]
    if set(nbytes) != set(errors):
        raise UsageError(f"there are sizes of weights without errors: {', '.join(sorted(set(nbytes) - set(errors)))}.")
    return [name for _, _, name, count in sorted(steps) for _ in range(count)]


def _slopes(losses: Sequence[float], sizes: Sequence[int]) -> list[tuple[float, int]]:
    """Return removed error per byte and number of blocks, falling: the lower convex hull of error over bytes."""
    steps: list[tuple[float, int, int]] = []
    for before, after, size in zip(losses, losses[1:], sizes[1:], strict=False):
        step = (before - after, size, 1)
        while steps and steps[-1][0] * step[1] <= step[0] * steps[-1][1]:
            last = steps.pop()
            step = (last[0] + step[0], last[1] + step[1], last[2] + step[2])
        steps.append(step)
    return [(drop / size, count) for drop, size, count in steps]
