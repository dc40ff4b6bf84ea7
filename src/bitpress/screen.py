"""Progress on standard error: a bar with an ETA on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from bitpress.progress import Progress, Silent

__all__ = ["Screen", "duration", "err", "size", "watch"]

err = Console(stderr=True, highlight=False)
# Columns of the bar, and of elapsed time, ETA and the spaces between.
_BAR, _TIMES = 20, 24


@contextlib.contextmanager
def watch(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yield what a function of the Python interface reports to.

    None is a bar if standard error is a terminal, and silence if not; True is a bar there and lines in a log; False is silence.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    if not isinstance(progress, bool):
        yield progress
    elif progress:
        with Screen() as screen:
            yield screen
    else:
        yield Silent()


class Screen:
    """Shows progress on standard error: a bar on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: Any = None
        self._what, self._total, self._done, self._already = "", 0, 0, 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self._stop()
        self._what, self._total, self._done, self._already = what, total, done, done
        self._started = self._said = time.monotonic()
        if err.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(_BAR),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=err)
            self._task = self._bar.add_task(what, total=total, completed=done, unit="")
            self._bar.start()
        else:
            err.print(f"{what}: {total - done} of {total} to do", soft_wrap=True)

    def advance(self, unit: str, **figures: Any) -> None:
        self._done += 1
        self._show(unit, float(self._done), figures, least=5)

    def step(self, unit: str, share: float, **figures: Any) -> None:
        self._show(unit, self._done + share, figures, least=15)

    def _show(self, unit: str, done: float, figures: Mapping[str, Any], least: float) -> None:
        """Show that so many units are done; in a log, if `least` seconds have passed since the last line."""
        due = self._bar is not None or done == self._total or time.monotonic() - self._said > least
        if not due:
            return
        memory = psutil.Process().memory_info().rss
        told = [f"{key} {value:.3g}" for key, value in figures.items()] + [f"memory {size(memory)}"]
        text = f"{unit}  {'  '.join(told)}"
        if self._bar is not None:
            # rich would cut every column alike, the ETA too; what is left of the line is for the unit.
            count = 2 * len(str(self._total)) + 1
            room = max(err.width - len(self._what) - _BAR - count - _TIMES, 0)
            self._bar.update(
                self._task, completed=done, unit=escape(text if len(text) <= room else text[: max(room - 1, 0)] + "…")
            )
            return
        self._said = time.monotonic()
        new = done - self._already
        left = duration((self._said - self._started) / new * (self._total - done)) if new > 0 else "?"
        err.print(f"{self._what}: {self._done}/{self._total} {text}  ETA {left}", soft_wrap=True)

    def note(self, text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def size(count: float) -> str:
    """12_345_678 -> '12.3 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """95 -> '1:35'."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"
