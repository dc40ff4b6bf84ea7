"""How figures are written and read if they are infinite or not a number.

in Python          inf              nan
in JSON            "inf", "-inf"    refused: NumericsError, exit 6, before anything is published
in texts, tables   inf              refused likewise
half widths (`*_ci95`, `*_stderr`) of a single window or question do not exist: infinite here, null in JSON
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.errors import NumericsError

__all__ = ["ratio_text", "shown", "written"]

WIDTHS = ("_ci95", "_stderr")


def written(figures: Any, where: str) -> Any:
    """Return figures as JSON values, nested ones too. Raises NumericsError, with `where` and its name, for a NaN."""
    if isinstance(figures, Mapping):
        return {name: _written(name, value, where) for name, value in figures.items()}
    if isinstance(figures, Sequence) and not isinstance(figures, (str, bytes)):
        return [_written("", value, where) for value in figures]
    return _written("", figures, where)


def _written(name: str, value: Any, where: str) -> Any:
    if not isinstance(value, float):
        return written(value, f"{where}: {name}" if name else where) if isinstance(value, (Mapping, list, tuple)) else value
    if math.isnan(value):
        raise NumericsError(f"{where}: {name or 'a figure'} is not a number; the model's outputs cannot be compared.")
    if math.isinf(value):
        return None if name.endswith(WIDTHS) else "inf" if value > 0 else "-inf"
    return value


def shown(value: float | str | None, form: str) -> str:
    """Return a figure as text by `form` ('{:.3f}'), as a number or as read from JSON: 'inf' if infinite, '-' for None."""
    if value is None:
        return "-"
    number = float(value)
    return form.format(number) if math.isfinite(number) else str(number)


def ratio_text(ratio: float) -> str:
    """Return the ratio of the original's bytes to the published ones in words: `the result is 2.00 times smaller`."""
    return f"the result is {ratio:.2f} times smaller" if ratio >= 1 else f"the result is {1 / ratio:.2f} times larger"
