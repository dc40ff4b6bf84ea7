"""Patterns of layers' names from a checkpoint, matched in bounded time.

Python's `re` goes back and tries again, which a pattern can make last for ever: `(a+)+b`. So a pattern is matched only if its ways to match a
name, each repetition and each alternative on its own, are no more than `MOST_WAYS`:

    x* x+ x{m,}     as many as the longest name has characters, and one
    x? x{m,n}       2; n - m + 1
    a|b|c           the sum of the alternatives', as the rest of a group multiplies

and if nothing is repeated that has more than one way itself. That leaves four `.*` for names of 80 characters. All matches of a checkpoint
together may take `SECONDS`.
"""

import re
import time
from collections.abc import Collection

from bitpress.errors import FormatError

__all__ = ["NamePatterns"]

MOST_WAYS = 10**8
MOST_LETTERS = 512
SECONDS = 20.0
# Escapes, classes, openings of groups, repetitions, and every other character.
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?:[:=!]|P<\w+>))?|(?P<count>\*|\+|\?|\{\d+(?:,\d*)?\}|\{,\d+\})(?P<suffix>[?+]?)|.",
    re.DOTALL,
)

# What Python warns of.
_SETS = re.compile(r"\[\^?\[|--|&&|~~|\|\|")


class NamePatterns:
    """The patterns that are tried on these names."""

    def __init__(self, names: Collection[str]) -> None:
        self._longest = max((2, *map(len, names)))
        self._known: dict[str, re.Pattern[str]] = {}
        self._until: float | None = None

    def compile(self, pattern: str) -> None:
        """Check a pattern before it is needed. Raises FormatError for one that is malformed or may take for ever."""
        shown = repr(pattern[:60])
        if pattern in self._known:
            return
        if len(pattern) > MOST_LETTERS:
            raise FormatError(f"{shown}... has {len(pattern)} characters; patterns of up to {MOST_LETTERS} are read.")
        if _SETS.search(pattern):
            raise FormatError(
                f"{shown} is no pattern that is read here: Python may take its classes for sets in later versions."
            )
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(f"{shown} is no pattern: {error}.") from error
        ways = _count_ways(pattern, self._longest)
        if ways is None or ways > MOST_WAYS:
            raise FormatError(
                f"{shown} is no pattern that is read here: it may take for ever to match nothing; write it with fewer repetitions."
            )
        self._known[pattern] = compiled

    def matches(self, pattern: str, name: str) -> bool:
        """Claim that a pattern matches the beginning of a name. Raises FormatError as `compile`, and when all time is spent."""
        self.compile(pattern)
        now = time.monotonic()
        self._until = now + SECONDS if self._until is None else self._until
        if now > self._until:
            raise FormatError(f"its patterns take more than {SECONDS:g} seconds to match; write fewer or simpler ones.")
        return self._known[pattern].match(name) is not None


def _count_ways(pattern: str, longest: int) -> int | None:
    """Return the most ways in which a pattern can match a name; None where one cannot say."""
    done, here, last = [0], [1], 1  # of every open group: ways of its finished alternatives, and of the one that is read
    for token in _TOKEN.finditer(pattern):
        text, count = token[0], token["count"]
        if count is not None:
            low, high = _bounds(count)
            times = longest if high is None else high
            if (last > 1 and times > 1) or token["suffix"] == "+":
                return None
            here[-1] = here[-1] // last * (last + 1 if times == 1 and low == 0 else max(times - low + 1, 1) * last)
            last = 1
            continue
        last = 1
        if text.startswith("(") and not text.startswith("\\"):
            if pattern.startswith("(?", token.start()) and text == "(":
                return None  # flags, conditions, looking back
            done.append(0)
            here.append(1)
        elif text == "|":
            done[-1] += here[-1]
            here[-1] = 1
        elif text == ")":
            last = done.pop() + here.pop()
            here[-1] *= last
    return done[0] + here[0]


def _bounds(count: str) -> tuple[int, int | None]:
    if count in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[count]
    low, comma, high = count[1:-1].partition(",")
    return int(low or 0), int(low) if not comma else int(high) if high else None
