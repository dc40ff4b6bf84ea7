"""Shared checks of the specifications of terms: keys, integers in a range, and the parts of a stack.

A term may be several weights of equal height, stacked along the rows (experts), with separate parameters: its `parts`. A specification
comes from a file, so every value in it is checked here before use.
"""

from collections.abc import Mapping
from typing import Any

from bitpress.errors import FormatError

__all__ = ["check_keys", "check_rows", "covered", "read_name", "read_parts", "read_whole", "with_parts"]


def check_keys(kind: str, spec: Mapping[str, Any], needed: set[str], optional: set[str] | None = None) -> None:
    """Raise FormatError unless a specification has exactly the needed keys, and otherwise only optional ones."""
    if not needed <= set(spec) <= needed | (optional or set()):
        raise FormatError(f"a {kind} term is specified by {', '.join(sorted(needed))}, not by {sorted(spec)}.")


def read_whole(spec: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """Return an integer of a specification. Raises FormatError unless it is between `low` and `high`."""
    value = spec[key]
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{key} is {value!r}; it must be a whole number of {low} to {high}.")
    return value


def read_name(spec: Mapping[str, Any], key: str) -> str:
    """Return a text of a specification."""
    value = spec[key]
    if not isinstance(value, str):
        raise FormatError(f"{key} is {value!r}; it must be a name.")
    return value


def read_parts(spec: Mapping[str, Any], rows: int) -> int:
    """Return the parts of a stack, 1 by default. Raises FormatError unless they divide the rows."""
    parts = spec.get("parts", 1)
    if type(parts) is not int or parts < 1 or rows % parts:
        raise FormatError(f"parts is {parts!r}; it must divide the {rows} rows of the weight.")
    return parts


def with_parts(spec: dict[str, Any], parts: int) -> dict[str, Any]:
    """Add the number of parts to a specification if there are several."""
    return spec | ({"parts": parts} if parts > 1 else {})


def check_rows(rows: int, start: int, stop: int) -> None:
    """Raise FormatError unless `start` to `stop` is a range of the rows."""
    if not 0 <= start < stop <= rows:
        raise FormatError(f"rows {start} to {stop} are out of the {rows} rows of the weight.")


def covered(rows: int, parts: int, start: int, stop: int) -> tuple[int, int]:
    """Return the first part that `start` to `stop` cover and the one after the last: rows of one part, or whole parts."""
    check_rows(rows, start, stop)
    height = rows // parts
    first, last = start // height, (stop - 1) // height
    if first != last and (start % height or stop % height):
        raise FormatError(f"rows {start} to {stop} begin or end inside a part of {height} rows.")
    return first, last + 1
