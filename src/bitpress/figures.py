"""Figures as they are written and read: what to do with an infinite one, and with one that is not a number.

in Python          inf              nan
in JSON            "inf", "-inf"    refused: NumericsError, exit 6, before anything is published
in texts, tables   inf              refused likewise
half widths (`*_ci95`, `*_stderr`) of a single window or question are infinite: there is none, in JSON null
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.errors import NumericsError

__all__ = ["shown", "written"]

WIDTHS = ("_ci95", "_stderr")


def written(figures: Any, where: str) -> Any:
    """Return figures as JSON has them, nested ones too. Raises NumericsError, with `where` and its name, for one that is no number."""
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
    """Return a figure for a text, as `form` says ('{:.3f}'), whether it was written or not: 'inf' for an infinite one, '-' for none."""
    if value is None:
        return "-"
    number = float(value)
    return form.format(number) if math.isfinite(number) else str(number)
