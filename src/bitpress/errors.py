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
    "unknown_name",
]


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


def unknown_name(kind: str, got: str, known: Iterable[str], listed: str | None = None) -> UsageError:
    """Make the error for a name that is in no table: it gives the nearest match and lists the table, or says `listed`."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {kind} {got!r}.{hint} {listed or 'Known: ' + ', '.join(names) + '.'}")
