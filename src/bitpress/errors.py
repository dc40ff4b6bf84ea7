"""Everything bitpress raises on purpose, and the exit code that each becomes on the command line.

    BitpressError                      exit
    ├── UsageError (ValueError)           2   an option, a name or a combination that cannot work
    ├── FormatError (ValueError)          2   a weight and a number format that do not fit each other
    ├── CalibrationError (ValueError)     2   calibration text that is missing, too short or without effect
    ├── CheckpointError (ValueError)      3   a model file or directory that is not what it must be
    ├── DiskError (OSError)               4   not enough room, or a write that failed
    ├── MemoryLimitError (MemoryError)    5   the memory that is needed is not there
    ├── NumericsError (ArithmeticError)   6   not a number, infinite, or further from the original than allowed
    ├── KernelUnavailable (RuntimeError)  2   no kernel for this pair of format and machine
    └── JobStopped (RuntimeError)        75   stopped on request; the same command goes on from there

A message says where, what was found, what is needed and what to do, in one line.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BitpressError",
    "CalibrationError",
    "CheckpointError",
    "DiskError",
    "FormatError",
    "JobStopped",
    "KernelUnavailable",
    "MemoryLimitError",
    "NumericsError",
    "UsageError",
    "fold",
    "nearest",
    "shown",
    "unknown_name",
]

# A table whose names are longer than this together is not listed whole in an error: a line and a half of a terminal.
SHORT_TABLE = 120
_SEPARATORS = {ord(separator): None for separator in "-_ "}


class BitpressError(Exception):
    """The root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(BitpressError, ValueError):
    exit_code = 2


class FormatError(BitpressError, ValueError):
    exit_code = 2


class CalibrationError(BitpressError, ValueError):
    exit_code = 2


class KernelUnavailable(BitpressError, RuntimeError):
    exit_code = 2


class CheckpointError(BitpressError, ValueError):
    exit_code = 3


class DiskError(BitpressError, OSError):
    exit_code = 4


class MemoryLimitError(BitpressError, MemoryError):
    exit_code = 5


class NumericsError(BitpressError, ArithmeticError):
    exit_code = 6


class JobStopped(BitpressError, RuntimeError):
    exit_code = 75


def fold(name: str) -> str:
    """Return a name without what people spell in different ways: its case, and `-`, `_` and spaces between its parts."""
    return name.casefold().translate(_SEPARATORS)


def nearest(got: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """Return the names that are most like `got`, the best first, whatever its case and separators."""
    spelled = {fold(name): name for name in sorted(known)}
    return [spelled[near] for near in difflib.get_close_matches(fold(got), spelled, n=count, cutoff=cutoff)]


def shown(value: object) -> str:
    """Return a value as an error shows it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def unknown_name(
    kind: str, got: str, known: Iterable[str], listed: str | None = None, command: str | None = None
) -> UsageError:
    """Make the error for a name that is in no table.

    It says the nearest match, then `listed`, or else the whole table where that is short, and the next few names where it is long;
    `command` lists a long one.
    """
    names = sorted(known)
    near = nearest(got, names)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    every = ", ".join(names)
    if listed is None and not names:
        listed = "There is no other."
    elif listed is None and len(every) <= SHORT_TABLE:
        listed = f"Known: {every}."
    elif listed is None:
        some = nearest(got, names, count=4, cutoff=0.3)[len(near) :]
        also = f"Also near: {', '.join(some)}. " if some else ""
        listed = f"{also}{f'`{command}` lists all' if command else 'There are'} {len(names)}."
    return UsageError(f"unknown {kind} {shown(got)}.{hint} {listed}")
