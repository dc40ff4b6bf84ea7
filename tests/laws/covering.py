"""Choose which pairs of two tables a law tries on every run; the others carry the marker `release`.

Every row meets every kind of other row, and every other row meets a row: with a hundred formats of a dozen kinds and thirty methods
that is a tenth of all pairs. `make test-release` tries all, and draws more examples where a law draws them.
Pairs that are not tried are not made either: thirteen thousand would be collected by every process only to be left out.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

__all__ = ["cover", "cover_pairs", "examples"]


def examples(by_day: int, release: int) -> int:
    """Return how many examples a law draws: as many as `release` says where `make test-release` asks for it."""
    return release if os.environ.get("BITPRESS_TESTS") == "release" else by_day


def cover_pairs(
    rows: Sequence[str], others: Sequence[str], kind: Callable[[str], Hashable], always: Iterable[str] = ()
) -> set[tuple[str, str]]:
    """Return pairs (row, other) so that every row meets every kind of other, every other a row, and all rows those of `always`."""
    kinds: dict[Hashable, list[str]] = {}
    for other in others:
        kinds.setdefault(kind(other), []).append(other)
    chosen = {(row, other) for row in rows for other in always}
    for members in kinds.values():
        # Rows take the members in turn, so that all of a large kind are met, and a small one is met by all.
        for turn in range(max(len(rows), len(members))):
            chosen.add((rows[turn % len(rows)], members[turn % len(members)]))
    return chosen


def cover(rows: Sequence[str], others: Sequence[str], kind: Callable[[str], Hashable], always: Iterable[str] = ()) -> list[Any]:
    """Return pairs as parameters of a test: those of `cover_pairs`, and for a release all others too, marked `release`."""
    chosen = cover_pairs(rows, others, kind, always)
    return [
        pytest.param(row, other, marks=() if (row, other) in chosen else pytest.mark.release)
        for row in rows
        for other in others
        if (row, other) in chosen or os.environ.get("BITPRESS_TESTS") == "release"
    ]
